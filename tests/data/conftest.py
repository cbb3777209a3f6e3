"""Tokenizers trained on the spot, and an own cache for `datasets`, so that runs share nothing."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Lines = Callable[[str, list[dict[str, object]]], str]
Numbered = Callable[[str, int], str]

CORPUS = ["hello world, the cat sat on the mat; there you are, user and assistant"] * 3
UNMARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"marked": MARKED, "unmarked": UNMARKED, None: None}


@cache
def trained() -> str:
    """A byte-level BPE as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Make a tokenizer whose pad token is its end of sequence.

    Args (of the fixture's value):
        chat: "marked", "unmarked", or another template, or None.
        adds: The post-processor's tokens: "", "bos" or "bos eos".
        trim: Whether offsets leave out white space, as in Llama 3.
    """

    def make(
        chat: str | None = "marked", *, adds: str = "", trim: bool = False
    ) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(trained())
        if trim:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        if adds:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>" if "eos" in adds else "<s> $A",
                special_tokens=[("<s>", 0), ("</s>", 1)],
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="</s>",
            chat_template=TEMPLATES.get(chat, chat),
            name_or_path="me/tiny",
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Adds nothing by itself; its chat template has marks."""
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture
def table() -> datasets.Dataset:
    """Four texts: one of them empty, one of 100 words."""
    texts = ["hello world", "", "the cat " * 50, "you"]
    return datasets.Dataset.from_dict({"text": texts, "id": list(range(4))})


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Write rows to a file of a name, and return its path."""

    def write(name: str, rows: list[dict[str, object]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def numbered(lines: Lines) -> Numbered:
    """Write a number of texts that differ."""
    return lambda name, number: lines(name, [{"text": f"hello {n}"} for n in range(number)])
