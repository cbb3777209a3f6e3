"""Trains with logits that are no number, on any number of ranks, and writes down what was raised.

Usage: python -m tests.fault_worker FOLDER
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import tiny
from tests.launch import finish

TOKEN = 50
"""The input token after which a broken teacher is lost."""


def biased(model: Any, token: int, value: float) -> Any:
    """The model with a bias on its head, 0 but for one token."""
    old = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        model.lm_head.weight.copy_(old.weight)
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = value
    return model


def broken(model: Any) -> Any:
    """The model with NaN for everything from one input token on."""
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKEN] = math.nan
    return model


def case(kind: str) -> tuple[Any, Any, Any]:
    """Student, teacher and objectives."""
    from llm_distill import CrossEntropy, Logits, jsd, reverse_kl

    student, teacher = tiny.llama("student"), tiny.llama("teacher")
    wanted = [CrossEntropy(weight=0.1), Logits()]
    if kind == "teacher nan":
        teacher = broken(teacher)
    elif kind == "teacher nan head":
        teacher = biased(teacher, TOKEN, math.nan)
    elif kind == "teacher inf head":
        teacher = biased(teacher, TOKEN, math.inf)
    elif kind.startswith("teacher -inf"):
        teacher = biased(teacher, TOKEN, -math.inf)
    else:
        student = biased(student, TOKEN, -math.inf)
    if kind == "student -inf jsd":
        wanted = [CrossEntropy(weight=0.1), Logits(loss=jsd)]
    if kind == "teacher -inf reverse":
        wanted = [CrossEntropy(weight=0.1), Logits(loss=reverse_kl)]
    return student, teacher, wanted


RAISED = (
    "teacher nan",
    "teacher nan head",
    "teacher inf head",
    "teacher -inf reverse",
    "student -inf",
)
LEGAL = ("student -inf jsd", "teacher -inf")
CASES = (*RAISED, *LEGAL)


def build(kind: str, folder: Path, **changes: Any) -> Any:
    """A trainer that logs at steps 2 and 4 of 5."""
    from llm_distill import DistillTrainer

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    given = {"max_steps": 5, "logging_steps": 2, "per_device_train_batch_size": 8 // ranks}
    return DistillTrainer(
        *case(kind),
        tiny.arguments(folder, **given | changes),
        train_dataset=rows(),
        processing_class=tiny.tokenizer(),
    )


def rows() -> list[Any]:
    """Never the student's forbidden token as a label; the broken token in row 6, place 5."""
    made = []
    for k, row in enumerate(tiny.rows(40)):
        ids = [51 if token == TOKEN else token for token in row["input_ids"]]
        if k == 6:
            ids[5] = TOKEN
        labels = [-100] * 6 + ids[6:] if k == 6 else [-100, *ids[1:]]
        made.append({"input_ids": ids, "labels": labels})
    return made


def run(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """What became of a training."""
    trainer = build(kind, folder, **changes)
    raised = None
    try:
        trainer.train()
    except FloatingPointError as error:
        raised = str(error)
    weights = [p for p in trainer.distiller.parameters() if p.dim() > 1]
    return {
        "raised": raised,
        "step": trainer.state.global_step,
        "finite": all(bool(p.isfinite().all()) for p in weights),
        "logs": trainer.state.log_history,
        "world": trainer.args.world_size,
    }


def main(folder: Path) -> None:
    """All cases."""
    torch.set_num_threads(1)
    found = {kind: run(kind, folder / "out") for kind in CASES}
    found["no logs"] = run("student -inf", folder / "out", logging_strategy="no")
    found["last"] = run("student -inf", folder / "out", logging_steps=4, max_steps=3)
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
