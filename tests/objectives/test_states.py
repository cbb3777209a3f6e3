"""The bound form of hidden states: mixtures, shares that are trained, maps that are drawn anew."""

from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill import HiddenStates, mse
from llm_distill import layers as layer_maps
from llm_distill.layers import LayerMap, Row
from llm_distill.objectives.gate import SUMS
from llm_distill.objectives.states import ANCHOR, HiddenStatesTerm
from llm_distill.rows import Step
from llm_distill.signals import Request
from tests.objectives.planted import TEACHER, TWIN, Layout, Scene, bound, scene
from tests.waiting import Waits

STEP = Step(0.0, torch.ones(1))
SOFT = LayerMap((Row(2, ((1, 0.25), (3, 0.75))), Row(4, ((4, 1.0),), weight=3.0)), 4, 4, "by hand")


def build(layers: Any, **options: Any) -> HiddenStatesTerm:
    term = bound(HiddenStates(layers=layers, **{"gate": False} | options), TWIN)
    assert isinstance(term, HiddenStatesTerm)
    return term


def normal(states: Tensor) -> Tensor:
    return F.layer_norm(states, states.shape[-1:])


def chosen(given: Scene, layer: int, *, teacher: bool = False) -> Tensor:
    signals = given.teacher if teacher else given.student
    return signals.hidden(layer, given.batch.supervised)


def value(term: HiddenStatesTerm, given: Scene) -> Tensor:
    return cast("Tensor", term(given.student, given.teacher, given.batch, STEP))


class TestMixtures:
    def test_each_layer_is_normalised_and_then_mixed_and_rows_weigh_what_they_say(self) -> None:
        given = scene(student=TWIN)
        theirs = [normal(chosen(given, k, teacher=True)) for k in (1, 3, 4)]
        soft = mse(normal(chosen(given, 2)), 0.25 * theirs[0] + 0.75 * theirs[1]).sum()
        last = mse(normal(chosen(given, 4)), theirs[2]).sum()
        assert torch.allclose(value(build(SOFT), given), (soft + 3 * last) / 4)

    def test_all_layers_of_a_mixture_are_asked_for(self) -> None:
        term = build(SOFT)
        assert term.student == Request(hidden=frozenset({2, 4}))
        assert term.teacher == Request(hidden=frozenset({1, 3, 4}))


class TestTrainedShares:
    def test_they_start_where_the_map_says_and_learn_from_the_loss(self) -> None:
        term, given = build(layer_maps.learned), scene(student=TWIN)
        start = layer_maps.learned(4, 4)
        fixed = LayerMap(start.rows, 4, 4, "the same, fixed")
        assert torch.allclose(value(term, given), value(build(fixed), given))
        for shares, row in zip(term.shares, start.rows, strict=True):
            assert shares.softmax(0).tolist() == pytest.approx([s for _, s in row.teacher])
        value(term, given).backward()
        assert all(shares.grad is not None and shares.grad.any() for shares in term.shares)

    def test_what_holds_them_is_their_divergence_from_the_start(self) -> None:
        term, given = build(layer_maps.learned), scene(student=TWIN)
        with torch.no_grad():
            for shares in term.shares:
                shares.add_(torch.linspace(0, 1, len(shares)))
        rows = layer_maps.learned(4, 4).rows
        now = [shares.softmax(0).tolist() for shares in term.shares]
        divergence = sum(
            p * torch.tensor(p / q).log()
            for shares, row in zip(now, rows, strict=True)
            for p, (_, q) in zip(shares, row.teacher, strict=True)
        )
        moved = tuple(
            Row(row.student, tuple(zip(row.layers, shares, strict=True)))
            for row, shares in zip(rows, now, strict=True)
        )
        there = value(build(LayerMap(moved, 4, 4, "moved")), given)
        held = value(term, given) - there
        expected = ANCHOR * len(given.batch.supervised) * divergence / 4
        assert held.item() == pytest.approx(float(expected), rel=1e-4)

    def test_what_holds_them_waits_for_no_device(self) -> None:
        term = build(layer_maps.learned).to("meta")
        with Waits() as waits:
            assert term._drift().device.type == "meta"
        assert waits.found == []

    def test_shares_too_small_for_a_float_are_no_nan(self) -> None:
        narrow = partial(layer_maps.learned, width=0.05)
        least = min(share for row in narrow(4, 4).rows for _, share in row.teacher)
        assert 0 < least < 1e-45
        term, given = build(narrow), scene(student=TWIN)
        found = value(term, given)
        found.backward()
        assert found.isfinite()
        assert all(s.grad is not None and s.grad.isfinite().all() for s in term.shares)

    def test_without_rows_they_have_a_graph(self) -> None:
        term = build(layer_maps.learned)
        found = value(term, scene(Layout(supervised="none"), student=TWIN))
        found.backward()
        assert found == 0
        assert all(s.grad is not None and not s.grad.any() for s in term.shares)


class TestRedrawnMaps:
    def test_each_epoch_has_a_map_of_its_own(self) -> None:
        term = build(layer_maps.random)
        assert term.teacher == Request(hidden=frozenset({1, 2, 3, 4}))
        for epoch in range(4):
            given = scene(student=TWIN, epoch=epoch)
            fixed = build(layer_maps.random(4, 4, epoch=epoch))
            assert torch.equal(value(term, given), value(fixed, given))
        assert term.mapping == layer_maps.random(4, 4, epoch=0)

    def test_maps_differ_between_epochs(self) -> None:
        drawn = partial(layer_maps.random, seed=1)
        objective = HiddenStates(layers=drawn, gate=False)
        term = bound(objective)
        values = {
            round(term(given.student, given.teacher, given.batch, STEP).item(), 9)
            for given in (scene(epoch=epoch) for epoch in range(6))
        }
        maps = {drawn(2, TEACHER.depth, epoch=epoch).pairs for epoch in range(6)}
        assert len(values) == len(maps) > 1

    def test_an_epoch_that_is_written_down_stays(self) -> None:
        term = build(partial(layer_maps.random, epoch=2))
        given = scene(student=TWIN, epoch=5)
        assert torch.equal(
            value(term, given), value(build(layer_maps.random(4, 4, epoch=2)), given)
        )


class TestGated:
    def test_it_watches_where_there_is_a_ledger(self) -> None:
        term, given = build(SOFT, gate=True), scene(student=TWIN)
        assert term.observes == SUMS
        assert term.factor() == 1.0
        value(term, given).backward()
        term.observed = torch.zeros(SUMS)
        expected = value(build(SOFT), given)
        found = value(term, given)
        assert torch.equal(found, expected)
        found.backward()
        assert term.observed[1] > 0
        assert term.observed[2] == 0  # there is nothing but the hint

    def test_it_tells_the_gate(self) -> None:
        term = build(SOFT, gate=True)
        assert term.gate is not None
        term.after_step(torch.tensor(0.0), 0.1, torch.ones(SUMS))
        term.after_step(torch.tensor(0.0), 0.2)
        assert term.gate.steps == 1

    def test_without_a_gate_there_is_none(self) -> None:
        term = build(SOFT)
        assert (term.observes, term.factor()) == (0, None)
        assert not any("gate" in name for name in term.state_dict())
