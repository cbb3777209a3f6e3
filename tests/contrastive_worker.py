"""Trains with contrast in one process and on two ranks; started alone or by torchrun.

Usage: python -m tests.contrastive_worker ENGINE FOLDER   (ENGINE: one, ddp, fsdp2)
"""

import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from tests import tiny
from tests.exactness_worker import EMPTY, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

LONELY = tuple(range(7))
"""Rows without any supervised token: the first step has one sequence that has some."""


def objectives() -> list[Any]:
    """Sequences, tokens, a queue that runs over, several layers."""
    from llm_distill import CrossEntropy
    from llm_distill import layers as layer_maps
    from llm_distill.objectives.contrastive import Contrastive

    return [
        CrossEntropy(weight=0.1),
        Contrastive(name="pooled", embedding=16, layers=layer_maps.uniform),
        Contrastive(name="token", items="token", embedding=16, apart=2, rows="valid"),
        Contrastive(name="queue", items="token", embedding=16, queue=50),
    ]


def train(folder: Path, batch: int, data: Any) -> Any:
    """Three steps; the trainer."""
    from llm_distill import DistillTrainer

    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    args = tiny.arguments(folder / "out", **sizes)
    models = tiny.llama("student"), tiny.llama("teacher")
    trainer = DistillTrainer(*models, objectives(), args, train_dataset=data)
    trainer.train()
    return trainer


def facts(trainer: Any) -> dict[str, Any]:
    """Weights and queues, logs, an evaluation, and what was found in the last step."""
    state = whole(trainer)
    logs = [
        {k: v for k, v in log.items() if k.startswith("loss")} for log in trainer.state.log_history
    ]
    metrics = trainer.evaluate(eval_dataset=tiny.rows(16))
    return {
        "state": state,
        "logs": [log for log in logs if log],
        "eval": {k: v for k, v in metrics.items() if k.startswith("eval_loss/")},
        "accuracy": [
            float(cast("Any", term).accuracy) for term in list(trainer.run.terms.values())[1:]
        ],
    }


def main(engine: str, folder: Path) -> None:
    """One global batch of 8 sequences in this launch."""
    torch.set_num_threads(1)
    if engine == "fsdp2":
        fsdp2_on_cpu()
    batch = 8 if engine == "one" else 4
    sets = {"full": (), "empty": EMPTY, "lonely": LONELY}
    found = {
        label: facts(train(folder, batch, list(tiny.rows(empty=empty))))
        for label, empty in sets.items()
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, folder / f"{engine}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
