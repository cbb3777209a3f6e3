"""A tiny student, teacher, tokenizer, data and recipe in a folder, for what reads files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny

VOCABULARY = 300
SENTENCES = [
    "the cat sat on the mat and looked at the dog",
    "a dog sees the cat and the cat sees the dog",
    "on the mat there is a cat, and beside the mat there is a dog",
    "who sat on the mat? the cat did, the dog did not",
]


@cache
def _trained(corpus: tuple[str, ...]) -> str:
    """A byte-level BPE as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def tokenizer(*corpus: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens; another corpus gives another one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(corpus or tuple(SENTENCES))),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}",
    )


FOREIGN = 280
"""Tokens of `foreign`."""


def foreign(side: str = "right") -> PreTrainedTokenizerFast:
    """Another family: other merges, special tokens at other places, one in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FOREIGN,
        special_tokens=["<end>", "<none>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["zebras doze where lions graze, and lions where zebras do"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<none>",
        padding_side=side,
    )


def save_model(folder: Path, role: str, *corpus: str) -> Path:
    """A Llama of two or four blocks, with its tokenizer."""
    model = tiny.llama(role, vocabulary=VOCABULARY)
    model.save_pretrained(folder)
    tokenizer(*corpus).save_pretrained(folder)
    return folder


def save_data(file: Path, rows: int = 16) -> Path:
    """Sentences, one for each line."""
    lines = [json.dumps({"text": SENTENCES[i % len(SENTENCES)]}) for i in range(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def document(folder: Path) -> dict[str, Any]:
    """A recipe of two quick steps, on what `fill` made in the folder."""
    return {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "data.jsonl"), "eval": 0.25, "max_length": 32},
        "objectives": [{"CrossEntropy": {"weight": 0.1}}, "Logits"],
        "training": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": "1e-3",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }


def fill(folder: Path) -> Path:
    """Student, teacher and data."""
    save_model(folder / "student", "student")
    save_model(folder / "teacher", "teacher")
    save_data(folder / "data.jsonl")
    return folder
