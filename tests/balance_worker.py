"""Trains under each balance in several splittings of one global batch, and from a checkpoint.

Usage: python -m tests.balance_worker ENGINE FOLDER   (ENGINE: one, ddp, fsdp2)
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_distill.balance import gradient, normalised, uncertainty
from llm_distill.objectives import Evidence, Objective, Term
from llm_distill.rows import Batch, Step
from llm_distill.signals import ModelSpec, Request, Signals
from tests import tiny
from tests.exactness_worker import EMPTY, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

RULES = {
    "none": None,
    "normalised": partial(normalised, momentum=0.5),
    "uncertainty": partial(uncertainty, learning_rate=0.1),
    "gradient": partial(gradient, every=2),
}
SHARDED = ("normalised", "gradient")
"""Those that are tried with sharded weights: one measures without gradients, one with."""


class ThinTerm(Term):
    """Keeps hidden states small, the less the more positions had a gradient in the last step."""

    observes = 2

    def __init__(self) -> None:
        self.seen: Tensor
        super().__init__(Request(hidden=frozenset({2})), Request())
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """Mean squares of the supervised rows; their backward is watched."""
        states = student.hidden(2, batch.supervised)
        if states.requires_grad:
            states.register_hook(self._watch)
        return states.square().mean(-1).sum()

    def _watch(self, slope: Tensor) -> None:
        """Rows with a gradient, and all rows."""
        assert self.observed is not None
        there = (slope != 0).any(-1).sum()
        self.observed += torch.stack([there, torch.full_like(there, len(slope))])

    def factor(self) -> Tensor:
        """From 1 towards 1 / 3."""
        return 1.0 / (1.0 + self.seen.mean() / 64.0)

    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        """Keep what was seen."""
        assert observed is not None
        self.seen.copy_(observed)


@dataclass(frozen=True, kw_only=True)
class Thin(Objective):
    """An objective of somebody's own that observes its backward."""

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Needs nothing."""
        del student, teacher, evidence
        return ThinTerm()


def build(rule: str, folder: Path, rows: Any, batch: int, accumulation: int, **changes: Any) -> Any:
    """A trainer with objectives of very different scales."""
    from llm_distill import CrossEntropy, DistillTrainer, HiddenStates, Logits
    from llm_distill.schedules import linear

    wanted = [
        CrossEntropy(weight=0.5),
        Logits(temperature=2.0),
        HiddenStates(weight=partial(linear, start=0.5, end=0.1), normalize="none", gate=False),
        Thin(weight=0.01),
    ]
    student = tiny.llama("student")
    if changes.pop("dropout", None):
        for layer in student.model.layers:
            layer.self_attn.attention_dropout = 0.1
    args = tiny.arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **changes,
    )
    trainer = DistillTrainer(
        student, tiny.llama("teacher"), wanted, args, balance=RULES[rule], train_dataset=rows
    )
    trainer.announces = False
    return trainer


def splittings(folder: Path, rule: str, engine: str) -> dict[str, Any]:
    """Weights, state and logs of 8 rows a step, some without anything supervised."""
    ranks = 1 if engine == "one" else 2
    facts: dict[str, Any] = {}
    rows = list(tiny.rows(empty=EMPTY))
    for batch in (8 // ranks,) if engine == "fsdp2" else (8 // ranks, 1):
        trainer = build(rule, folder / "out", rows, batch, 8 // ranks // batch)
        trainer.train()
        told = [entry for entry in trainer.state.log_history if "loss" in entry]
        kept = [{k: v for k, v in log.items() if k.startswith(("loss", "weight"))} for log in told]
        facts[str(batch)] = {"weights": whole(trainer), "logs": kept}
    return facts


def resumed(folder: Path, rule: str, ranks: int) -> dict[str, Any]:
    """Four steps straight, and the last two again from a checkpoint, with AdamW and dropout."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    facts: dict[str, Any] = {}
    for name in ("straight", "resumed"):
        trainer = build(rule, folder, tiny.rows(), 4 // ranks, 2, dropout=True, **options)
        checkpoint = str(folder / "checkpoint-2") if name == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        facts[name] = whole(trainer)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        facts["files"] = sorted(path.name for path in (folder / "final").iterdir())
    return facts


def main(engine: str, folder: Path) -> None:
    """Every balance."""
    torch.set_num_threads(1)
    if engine == "fsdp2":
        fsdp2_on_cpu()
    ranks = 1 if engine == "one" else 2
    facts = {}
    for rule in SHARDED if engine == "fsdp2" else RULES:
        facts[rule] = splittings(folder / engine, rule, engine)
        facts[rule] |= resumed(folder / engine / rule, rule, ranks)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(facts, folder / f"{engine}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
