"""What the evaluation of a run does not say: size, speed, and how a model writes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts._quickstart.settings import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

BATCH = 16  # Sequences read at once when speed is measured.
LEAST_SECONDS = 1.0
PROMPT_WORDS = 8
NEW_TOKENS = 40


@dataclass(frozen=True)
class Row:
    """A model in the final table.

    Attributes:
        name: Of the model.
        perplexity: On the held-out text.
        kl: KL(teacher || model), nats per token.
        agreement: Fraction of tokens where it and the teacher put the same token first.
        parameters: Their number.
        speed: Tokens read per second, in a forward pass.
        sample: How it goes on with the prompt.
    """

    name: str
    perplexity: float
    kl: float
    agreement: float
    parameters: int
    speed: float
    sample: str


def measure(name: str, folder: Path, metrics: Mapping[str, float], prompt: str) -> Row:
    """Load a saved model as anybody would, and complete its row.

    Args:
        name: In the table.
        folder: Of the model and its tokenizer.
        metrics: `perplexity`, `kl` and `agreement`.
        prompt: To go on with.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Row(
        name=name,
        **metrics,
        parameters=model.num_parameters(),
        speed=tokens_per_second(model),
        sample=continuation(model, tokenizer, prompt),
    )


def prompt_of(text: str) -> str:
    """The first words of a paragraph of the last document that has three times as many."""
    paragraphs = [line.split() for line in text.strip().split("\n\n")[-1].splitlines()]
    long = next((words for words in paragraphs if len(words) >= 3 * PROMPT_WORDS), paragraphs[0])
    return " ".join(long[:PROMPT_WORDS])


def tokens_per_second(model: PreTrainedModel) -> float:
    """Speed of the forward pass: the best of the passes of one second, after one to warm up."""
    import torch

    tokens = torch.zeros(BATCH, BLOCK, dtype=torch.long)
    passes: list[float] = []
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
        while not passes or sum(passes) < LEAST_SECONDS:
            start = time.perf_counter()
            model(input_ids=tokens, use_cache=False)
            passes.append(time.perf_counter() - start)
    return tokens.numel() / min(passes)


def continuation(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:  # noqa: ANN401
    """What a model writes after a prompt, drawn with one seed for all models."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    generate: Any = model.generate
    written = generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = written[0, inputs["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(new, skip_special_tokens=True).split())
