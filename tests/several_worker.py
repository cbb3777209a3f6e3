"""Trains students of several teachers, in several splittings; started alone or by torchrun.

Usage: python -m tests.several_worker ENGINE FOLDER   (ENGINE: one, ddp, fsdp2)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import tiny
from tests.exactness_worker import EMPTY, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

KINDS = ("ensemble", "routed", "streamed")
DOMAINS = ("code", "prose")


def rows(count: int = 32) -> list[dict[str, Any]]:
    """Rows with a column; those of the first four, a micro-batch of a rank, have one expert."""
    examples: list[dict[str, Any]] = [dict(row) for row in tiny.rows(count, empty=EMPTY)]
    for place, row in enumerate(examples):
        row["domain"] = DOMAINS[0 if place < 4 else place % 3 // 2]
    return examples


def spec(kind: str) -> tuple[Any, list[Any]]:
    """The teacher, and what is learned from it."""
    from llm_distill import CrossEntropy, Ensemble, HiddenStates, Logits, Routed
    from llm_distill.layers import last, uniform

    objectives: list[Any] = [CrossEntropy(weight=0.5), Logits(temperature=2.0)]
    one = tiny.llama("teacher")
    if kind == "ensemble":
        hints = [
            HiddenStates(member=0, layers=uniform, init="least_squares", rows="valid", weight=0.2),
            HiddenStates(member=1, layers=last, weight=0.1),
        ]
        return Ensemble([one, tiny.gpt2()], [2, 1], confidence="label"), [*objectives, *hints]
    two = tiny.sharpened(type(one), one.config, seed=5)
    hint = HiddenStates(layers=last, weight=0.2)
    return Routed(dict(zip(DOMAINS, (one, two), strict=True)), by="domain"), [*objectives, hint]


def train(kind: str, folder: Path, batch: int, accumulation: int) -> Any:
    """Three steps; the trainer."""
    import datasets

    from llm_distill import DistillTrainer

    args = tiny.arguments(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    teacher, objectives = spec(kind)
    data: Any = rows()
    if kind == "streamed":
        # A stream's useless rows are left out, which would change its batches.
        kept = [row for place, row in enumerate(rows()) if place not in EMPTY]
        data = datasets.Dataset.from_list(kept).to_iterable_dataset()
    trainer = DistillTrainer(tiny.llama("student"), teacher, objectives, args, train_dataset=data)
    trainer.train()
    return trainer


def main(engine: str, folder: Path) -> None:
    """Every kind, whole and in micro-batches."""
    torch.set_num_threads(1)
    if engine == "fsdp2":
        fsdp2_on_cpu()
    ranks = 1 if engine == "one" else 2
    found: dict[str, Any] = {}
    for kind in KINDS:
        for batch in (8 // ranks, 1):
            trainer = train(kind, folder / engine, batch, 8 // ranks // batch)
            logs = [log["kl"] for log in trainer.state.log_history if "kl" in log]
            found[f"{kind} {batch * ranks}"] = {"weights": whole(trainer), "kl": logs}
            found["wrapped"] = type(trainer.model_wrapped).__name__
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, folder / f"{engine}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
