"""Small models: configs, teachers that are trained on the spot, students to begin with."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from llm_distill import FromConfig, FromTeacher
from scripts.bench.mapping.texts import VOCABULARY, Example, collate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llm_distill.students import Student
    from scripts.bench.mapping.settings import Pair, Settings, Shape

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""

TEACHER_BATCH = 16


def config(shape: Shape, length: int) -> dict[str, Any]:
    """What a config is given beyond its architecture: no dropout, so that runs are paired."""
    w, d, h = shape.width, shape.depth, shape.heads
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
    common |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    common["initializer_range"] = 0.05
    if shape.architecture == "gpt2":
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return common | {"n_embd": w, "n_layer": d, "n_head": h, "n_positions": length} | none
    own: dict[str, Any] = {
        "hidden_size": w,
        "num_hidden_layers": d,
        "num_attention_heads": h,
        "max_position_embeddings": length,
    }
    if shape.architecture == "roformer":
        none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        return common | own | {"intermediate_size": 3 * w} | none
    return common | own | {"intermediate_size": 5 * w // 2, "num_key_value_heads": h}


def build(shape: Shape, length: int, seed: int, *, masked: bool) -> Any:  # noqa: ANN401  any model
    """A model with random weights."""
    made = AutoConfig.for_model(shape.architecture, **config(shape, length))
    torch.manual_seed(seed)
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return auto.from_config(made)


def train(model: Any, passages: Sequence[Example], steps: int, rate: float) -> None:  # noqa: ANN401
    """Plain cross-entropy: AdamW, a cosine, passages in the order they have."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
        ],
        [warm],
    )
    model.train()
    for step in range(steps):
        places = range(step * TEACHER_BATCH, (step + 1) * TEACHER_BATCH)
        batch = collate([passages[place % len(passages)] for place in places])
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def cross_entropy(model: Any, passages: Sequence[Example]) -> float:  # noqa: ANN401  any model
    """Nats per byte that is asked for."""
    return float(model(**collate(list(passages))).loss)


def keep(model: Any, folder: Path) -> None:  # noqa: ANN401  any model
    """A saved model, whole or not at all."""
    half = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    model.save_pretrained(half)
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


def student(pair: Pair, settings: Settings, folder: Path, blocks: str, seed: int) -> Student:
    """What a training starts from.

    Args:
        pair: Its start says which.
        settings: Length of the sequences.
        folder: Of the pair's models.
        blocks: Of the teacher, for students that are cut from it.
        seed: Of random weights.
    """
    depth = pair.student.depth
    if pair.start == "pretrained":
        return str(folder / "student")
    if pair.start == "random":
        shape = pair.student
        return FromConfig(shape.architecture, config(shape, settings.length), seed=seed)
    if blocks == "last":
        return FromTeacher(layers=[place - depth for place in range(depth)])
    if blocks not in ("ends", "uniform", "first"):
        raise ValueError(f"there is no choice of blocks {blocks!r}; write ends, uniform, …")
    return FromTeacher(depth, blocks)  # type: ignore[arg-type]  # one of the words
