"""Runs with a race in them, for the tests of races."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_distill import DistillTrainer, HiddenStates, Logits
from llm_distill.layers import auto_race
from llm_distill.students import FromTeacher
from tests import on_disk, tiny

RACE = partial(auto_race, share=0.9, weights=(1.0,), shortest=1)
OBJECTIVES = Logits(), HiddenStates(layers=RACE)


def trainer(folder: Path, *objectives: Any, model: Any = None, **given: Any) -> DistillTrainer:
    """A run of 40 steps between loaded models."""
    own = ("callbacks", "peft_config", "balance", "train_dataset", "teacher", "optimizers")
    kwargs = {k: v for k, v in given.items() if k in own}
    kwargs.setdefault("train_dataset", tiny.rows(32))
    teacher = kwargs.pop("teacher", None) or tiny.llama("teacher")
    changes = {"max_steps": 40} | {k: v for k, v in given.items() if k not in own}
    args = tiny.arguments(folder, **changes)
    model = model if model is not None else tiny.llama("student")
    torch.manual_seed(0)  # adapters are drawn
    return DistillTrainer(model, teacher, objectives or OBJECTIVES, args, **kwargs)


def named(folder: Path) -> dict[str, Any]:
    """A teacher on the disk, and a student cut from it."""
    if not (folder / "teacher").exists():
        on_disk.save_model(folder / "teacher", "teacher")
    return {"model": FromTeacher(depth=2), "teacher": str(folder / "teacher")}


def weights(of: DistillTrainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in of.distiller.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def deep() -> Any:
    """A student of four blocks, so that no two usual maps are the same."""
    model = tiny.llama("teacher")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    return model
