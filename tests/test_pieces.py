"""Weights in pieces, with a stand-in for ZeRO-3's; with DeepSpeed itself in tests/zero3."""

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llm_distill import pieces
from llm_distill.errors import InputError

REGISTERED: list[tuple[Any, Any]] = []


class Gathered:
    """Fills parameters while it is open, as DeepSpeed does."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights: list[Any] = list(weights)

    def __enter__(self) -> None:
        for weight in self._weights:
            weight.all_gather()

    def __exit__(self, *error: object) -> None:
        for weight in self._weights:
            weight.data = torch.empty(0)
            weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")


@pytest.fixture(autouse=True)
def _deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DeepSpeed of two functions."""

    def register(module: Any, weight: Any) -> None:
        REGISTERED.append((module, weight))

    REGISTERED.clear()
    stand_in = SimpleNamespace(GatheredParameters=Gathered, register_external_parameter=register)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero", stand_in)


def partitioned(whole: torch.Tensor) -> Any:
    """The first half of a weight, as the first of two processes has it."""
    weight: Any = nn.Parameter(torch.empty(0))

    def gather() -> None:
        weight.data = whole.clone()
        weight.ds_status = SimpleNamespace(name="AVAILABLE")

    weight.ds_id, weight.ds_shape = 0, whole.shape
    weight.ds_tensor = whole.flatten()[: whole.numel() // 2]
    weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    weight.ds_active_sub_modules = set()
    weight.all_gather = gather
    return weight


WHOLE = torch.arange(8.0).view(4, 2)


def test_a_plain_weight() -> None:
    weight = nn.Parameter(WHOLE.clone())
    assert not pieces.is_piece(weight)
    assert pieces.own_part(weight) is pieces.whole(weight) is weight
    assert pieces.resident(weight) == 32
    assert pieces.shape_of(weight) == (4, 2)
    assert not pieces.in_pieces(None)
    assert not pieces.in_pieces(nn.Linear(2, 2))


def test_what_is_kept_of_a_partitioned_weight() -> None:
    weight = partitioned(WHOLE)
    assert pieces.is_piece(weight)
    assert pieces.own_part(weight).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert pieces.resident(weight) == 16
    assert pieces.shape_of(weight) == (4, 2)
    model = nn.Module()
    model.register_parameter("weight", weight)
    assert pieces.in_pieces(model)


class TestWhole:
    def test_what_was_gathered_stays_when_the_parameter_is_emptied(self) -> None:
        weight = partitioned(WHOLE).requires_grad_(requires_grad=False)
        assert torch.equal(pieces.whole(weight), WHOLE)
        assert weight.numel() == 0

    def test_a_frozen_one_that_is_gathered_already(self) -> None:
        """A copy of the student within the distiller: its head is emptied before it is used."""
        weight = partitioned(WHOLE).requires_grad_(requires_grad=False)
        weight.all_gather()
        found = pieces.whole(weight)
        weight.data = torch.empty(0)
        assert torch.equal(found, WHOLE)

    def test_a_trained_one_is_the_parameter_itself(self) -> None:
        weight = partitioned(WHOLE)
        weight.all_gather()
        assert pieces.whole(weight) is weight

    def test_a_trained_one_without_gradients(self) -> None:
        with torch.no_grad():
            assert torch.equal(pieces.whole(partitioned(WHOLE)), WHOLE)

    def test_a_gradient_that_would_be_lost_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="is read for a gradient outside of the module"):
            pieces.whole(partitioned(WHOLE))


class TestLending:
    def test_it_is_registered_gathered_and_held(self) -> None:
        weight, module = partitioned(WHOLE), nn.Module()
        vars(module)["ds_id"] = 7
        pieces.lend((weight, None), module)
        assert [(a, b) for a, b in REGISTERED if a is module and b is weight]
        assert torch.equal(weight, WHOLE)
        assert weight.ds_active_sub_modules == {7}

    def test_plain_weights_need_nobody(self) -> None:
        pieces.lend((nn.Parameter(WHOLE), None), nn.Module())
        assert not REGISTERED


def test_a_model_that_an_engine_runs_is_not_taken_from_it() -> None:
    model: Any = nn.Module()
    model.register_parameter("weight", partitioned(WHOLE))
    vars(model)["ds_id"] = 3
    with pytest.raises(InputError, match=r"of a DeepSpeed engine of before; save it .* and give"):
        pieces.make_whole(model)


def test_a_model_that_was_emptied_is_whole_again() -> None:
    model: Any = nn.Module()
    weight = partitioned(WHOLE)
    for name in ("weight", "tied"):
        model.register_parameter(name, weight)
    pieces.make_whole(model)
    assert model.weight is model.tied is weight
    assert torch.equal(weight, WHOLE)
    assert not pieces.in_pieces(model)
    pieces.make_whole(model)  # twice is once
    assert torch.equal(weight, WHOLE)
