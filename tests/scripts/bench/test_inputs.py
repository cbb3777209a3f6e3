"""Losses by name, and random inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llm_distill.losses import forward_kl, jsd, mse
from scripts.bench.inputs import LOSSES, Inputs, Loss
from scripts.bench.settings import HeadSettings

SMALL = HeadSettings(rows=6, vocab=40, student_width=8, teacher_width=16)


def test_a_plain_name_is_the_function_itself() -> None:
    assert Loss.parse("forward_kl").function is forward_kl


def test_arguments_are_bound() -> None:
    function = Loss.parse("jsd:beta=0.25").function
    assert isinstance(function, partial)
    assert (function.func, function.keywords) == (jsd, {"beta": 0.25})


def test_only_divergences_are_offered() -> None:
    assert mse.__name__ not in LOSSES
    with pytest.raises(ValueError, match="there is no divergence 'mse'; there are forward_kl, "):
        Loss.parse("mse")


@pytest.mark.parametrize("text", ["jsd:beta", "jsd:beta=half", "jsd:beta=0.5,x"])
def test_arguments_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no argument; write jsd:beta=0\.5"):
        Loss.parse(text)


@pytest.mark.parametrize(
    ("text", "beta"),
    [
        ("forward_kl", 0.0),
        ("reverse_kl", 1.0),
        ("jsd", 0.5),
        ("jsd:beta=0.9", 0.9),
        ("jsd:normalize_ends=True", None),
        ("tvd", None),
    ],
)
def test_place_in_the_family_of_gkd(text: str, beta: float | None) -> None:
    assert Loss.parse(text).beta == beta


def test_inputs_are_the_same_for_a_seed() -> None:
    one, two = Inputs.draw(SMALL), Inputs.draw(SMALL)
    assert torch.equal(one.student, two.student)
    assert torch.equal(one.teacher_weight, two.teacher_weight)
    assert one.student.shape == (6, 8)
    assert one.teacher_weight.shape == (40, 16)


def test_a_frozen_head_shares_its_weight_and_has_no_gradient() -> None:
    inputs = Inputs.draw(SMALL)
    assert inputs.frozen.student_weight.data_ptr() == inputs.student_weight.data_ptr()
    assert not inputs.frozen.student_weight.requires_grad
    assert inputs.frozen.student is inputs.student
