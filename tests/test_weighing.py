"""Weights as a step uses them: schedule, gate and balance multiplied."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import CrossEntropy, Logits
from llm_distill.balance import Balance
from llm_distill.binding import bind
from llm_distill.schedules import linear
from llm_distill.signals import ModelSpec
from llm_distill.weighing import Weighing, sent

CPU = torch.device("cpu")
SPEC = ModelSpec("m", "llama", 2, 8, 2, 7)
FADING = partial(linear, start=1.0, end=0.0)


class Growing(Balance):
    """Factors 2 and 3 for weights that are not 0."""

    moves = True

    def factors(self, weights: Tensor) -> Tensor:
        return torch.tensor([2.0, 3.0], device=weights.device) * (weights != 0)


def weighing(
    *weights: Any, gate: float | None = None, balance: Balance | None = None, device: Any = CPU
) -> Weighing:
    objectives = [CrossEntropy(weight=weights[0]), Logits(weight=weights[1])]
    terms = bind(objectives, SPEC, SPEC, seed=0)
    if gate is not None:
        terms["Logits"].factor = lambda: torch.tensor(gate, device=device)  # type: ignore[method-assign]  # a gate
    return Weighing(objectives, terms, balance or Balance(), device)


def test_numbers_are_as_written_and_not_logged() -> None:
    plain = weighing(0.5, 2.0)
    assert plain.now(0.3).tolist() == [0.5, 2.0]
    assert plain.shown() == {}


def test_a_schedule_follows_the_progress_and_is_logged() -> None:
    fading = weighing(0.5, FADING)
    assert fading.now(0.25).tolist() == [0.5, 0.75]
    assert fading.shown() == {"weight/Logits": 0.75}


def test_a_gate_is_multiplied_and_logged() -> None:
    assert weighing(0.5, FADING, gate=0.5).now(0.5).tolist() == [0.5, 0.25]
    gated = weighing(0.5, 2.0, gate=0.25)
    gated.now(0.0)
    assert gated.shown() == {"weight/Logits": 0.5}


def test_a_balance_sees_weights_behind_schedules_and_gates() -> None:
    """All are logged, as the last step had them."""
    balanced = weighing(0.5, FADING, gate=0.5, balance=Growing())
    assert balanced.shown() == {}
    assert balanced.now(0.5).tolist() == [1.0, 0.75]
    assert balanced.shown() == {"weight/CrossEntropy": 1.0, "weight/Logits": 0.75}
    assert balanced.now(1.0).tolist() == [1.0, 0.0]


def test_a_step_of_its_own_kind_goes_without_the_balance() -> None:
    balanced = weighing(0.5, FADING, gate=0.5, balance=Growing())
    assert balanced.now(0.5, balanced=False).tolist() == [0.5, 0.25]


def test_evaluations_have_the_schedules_alone() -> None:
    assert weighing(0.5, FADING, gate=0.5, balance=Growing()).written(0.5).tolist() == [0.5, 0.5]


def test_the_host_reads_nothing_before_the_log() -> None:
    """`meta` tensors have no values that could be read."""
    far = weighing(0.5, FADING, gate=0.5, balance=Growing(), device=torch.device("meta"))
    assert far.now(0.5).is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        far.shown()


def test_numbers_go_to_the_device_in_fp32() -> None:
    there = sent([1, 2.5], CPU)
    assert there.dtype == torch.float32
    assert there.tolist() == [1.0, 2.5]
