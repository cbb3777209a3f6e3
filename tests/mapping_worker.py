"""Decides maps and trains with a gate, as one process or as two gloo ranks of one global batch.

Usage: python -m tests.mapping_worker FOLDER   (beside it the folders `student` and `teacher`)
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests import tiny
from tests.launch import finish


def train(folder: Path) -> dict[str, Any]:
    """Twelve steps of four rows: a block of the gate, two of the next; a look after the second."""
    from llm_distill import DistillTrainer, HiddenStates, Logits, refreshing
    from llm_distill import layers as layer_maps
    from llm_distill.surveying import FILE

    args = tiny.arguments(folder / "out", max_steps=12, per_device_train_batch_size=4)
    args.per_device_train_batch_size = 4 // args.world_size
    student, teacher = (str(folder.parent / role) for role in ("student", "teacher"))
    objectives = [
        Logits(),
        HiddenStates(rows="valid"),
        HiddenStates(layers=partial(layer_maps.transport, refresh=2), rows="valid"),
    ]
    trainer = DistillTrainer(student, teacher, objectives, args, train_dataset=tiny.rows(32))
    _wait()
    files = [file.name for file in (folder / "out").iterdir()]
    with patch.object(refreshing, "refreshed", wraps=layer_maps.refreshed) as looked:
        trainer.train()
    given = [call.args for call in looked.call_args_list]
    terms: list[Any] = list(trainer.run.terms.values())[1:]
    gates = {f"{k}.{n}": b for k in (0, 1) for n, b in terms[k].gate.state_dict().items()}
    return {
        "pairs": [term.mapping.pairs for term in terms],
        "files": files,
        "gate": gates,
        "similarity": load_file(folder / "out" / FILE),
        "looks": [(proposed.pairs, cross.values) for _, proposed, cross in given],
    }


def main(folder: Path) -> None:
    """Train, and write down what this rank found."""
    torch.set_num_threads(1)
    torch.save(train(folder), folder / f"{dist.get_rank()}.pt")
    finish()


def _wait() -> None:
    """Rank 0 writes what the others read."""
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
