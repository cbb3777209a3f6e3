"""Races between layer maps on any number of ranks, and writes down what was decided.

Usage: python -m tests.race_worker FOLDER
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import tiny
from tests.launch import finish


def main(folder: Path) -> None:
    """One race, a step of training, and what every rank came to."""
    from llm_distill import DistillTrainer, HiddenStates, Logits
    from llm_distill.layers import auto_race
    from llm_distill.race.heats import Heats

    torch.set_num_threads(1)
    told: list[Any] = []
    measure = Heats.measure

    def noted(self: Heats, arm: Any, steps: int) -> float:
        told.append([arm.describe(), steps, measure(self, arm, steps)])
        return float(told[-1][2])

    Heats.measure = noted  # type: ignore[method-assign]  # to look
    args = tiny.arguments(folder / "out", max_steps=40)
    args.per_device_train_batch_size = 8 // args.world_size
    race = partial(auto_race, share=0.9, weights=(1.0,), shortest=1)
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        [Logits(), HiddenStates(layers=race)],
        args,
        train_dataset=tiny.rows(40),
    )
    hints: list[Any] = [o for o in trainer.run.objectives if isinstance(o, HiddenStates)]
    winner = [asdict(hint.layers) for hint in hints]
    trainer.args.max_steps = 1
    trainer.train()
    found = {"told": told, "winner": winner, "world": args.world_size, "step": 1}
    (folder / f"{args.world_size}.{args.process_index}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
