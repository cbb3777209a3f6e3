"""A teacher that follows hears of each optimizer step, once."""

from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from llm_distill.distiller import Distiller
from llm_distill.following import Follow
from llm_distill.objectives import Logits
from llm_distill.signals import ModelSpec, Request
from llm_distill.teachers.within import Copy
from tests import tiny


def distiller(decay: float | None) -> Distiller:
    student = tiny.llama("student")
    spec = ModelSpec.of(student.config, "student")
    within = Copy(tiny.llama("student"), Request(logits=True), "x", decay=decay)
    return Distiller(student, {"Logits": Logits().build(spec, spec)}, "student", within=within)


def test_a_step_moves_it_by_its_share(tmp_path: Any) -> None:
    made = distiller(0.75)
    with torch.no_grad():
        made.student.lm_head.weight.add_(1.0)  # type: ignore[union-attr, operator]
    start = made.within.model.lm_head.weight.clone()  # type: ignore[union-attr]
    args = tiny.arguments(tmp_path)
    Follow(made).on_step_end(args, TrainerState(), TrainerControl())
    moved = made.within.model.lm_head.weight - start  # type: ignore[union-attr]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25))


def test_its_weights_are_no_part_of_what_is_trained() -> None:
    made = distiller(0.75)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("student.") for name in trained)
    assert not made.train().within.training  # type: ignore[union-attr]
