"""What holds for every loss on features, whatever its options: one table, seven rules."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import AttentionMaps, HiddenStates, map_kl, map_mse, projectors
from llm_distill import heads as head_rules
from llm_distill import layers as layer_maps
from llm_distill.objectives import Mapped, QueryPlan, Term
from llm_distill.objectives.contrastive import Contrastive
from llm_distill.objectives.relations import Relations
from llm_distill.rows import Step
from tests.losses.feature_catalogue import CASES
from tests.objectives.planted import STUDENT, TWIN, Layout, Scene, bound, said, scene

STEP = Step(0.0, torch.ones(1))
MAP = partial(layer_maps.explicit, pairs=[[1, 2], [2, 1], [2, 4]])
"""One student layer in two rows; no layer stands for itself."""
DIAGONAL = partial(layer_maps.explicit, pairs=[[1, 1], [4, 4]])

LOSSES = {
    name: CASES[name].loss
    for name in (
        "mse",
        "cosine",
        "huber(1.0)",
        "attention_transfer(2)",
        "nst(polynomial)",
        "nst(linear)",
        "nst(gaussian)",
        "pkt",
        "rkd_distance(1.0)",
        "rkd_angle(1.0)",
        "cka",
        "info_nce(0.07)",
    )
}
ROW_BY_ROW = ("mse", "cosine", "huber(1.0)")
PROFILES: dict[str, dict[str, Any]] = {
    "plain": {"normalize": "none"},
    "layer, skip": {"normalize": "layer", "skip": 2},
    "l2, most": {"normalize": "l2", "most": 4},
    "linear": {"projector": projectors.linear},
    "mlp, skip, most": {"projector": projectors.mlp, "skip": 1, "most": 4},
    "orthogonal": {"projector": projectors.orthogonal, "normalize": "layer"},
}
EVEN = {
    f"attention_transfer(2), {items}, {rows}, {profile}"
    for items, rows, profile in product(
        ("token", "pooled"), ("supervised", "valid"), ("layer, skip", "orthogonal")
    )
}
"""Layer normalisation gives all rows one energy, so that there is nothing to compare."""
PROJECTED = (", linear", ", mlp", ", orthogonal")


@dataclass(frozen=True)
class Case:
    """An objective with its options, and what is known of it.

    Attributes:
        make: From a layer map.
        rows: Which it counts.
        pulls: Whether equal models read 0, with a gradient of 0. A contrast does not.
        adds_up: Whether micro-batches add up to the whole.
        draws: Whether what it takes depends on which sequences are together.
        least: Rows of a group below which it says nothing.
    """

    make: Callable[[Any], Mapped]
    rows: str
    pulls: bool = True
    adds_up: bool = True
    draws: bool = False
    least: int = 1

    def objective(self, layers: Any = MAP) -> Mapped:
        return self.make(layers)


def hidden_cases() -> Iterator[tuple[str, Case]]:
    """Each loss on each kind of items with each profile, and half of these on each kind of rows."""
    items = ("token", "sequence", "pooled")
    combined = product(enumerate(LOSSES.items()), enumerate(items), enumerate(PROFILES.items()))
    for (i, (name, loss)), (j, item), (k, (label, options)) in combined:
        row = ("supervised", "valid")[(i + j + k) % 2]
        alone = item == "sequence"
        known = Case(
            make=partial(_hidden, loss=loss, items=item, rows=row, **options),
            rows=row,
            pulls=CASES[name].pulls,
            adds_up=(name in ROW_BY_ROW or alone) and (alone or "most" not in options),
            draws="most" in options and not alone,
            least=HiddenStates(loss=loss).needs.least,
        )
        yield f"{name}, {item}, {row}, {label}", known


def _hidden(layers: Any, **options: Any) -> HiddenStates:
    return HiddenStates(layers=layers, gate=False, **options)


def map_cases() -> Iterator[tuple[str, Case]]:
    rules = {"mean": head_rules.mean, "group": head_rules.group, "match": head_rules.match}
    for loss, (rule, heads), row, queries in product(
        (map_kl, map_mse), rules.items(), ("supervised", "valid"), (None, 2)
    ):
        options: Any = {"loss": loss, "heads": heads, "rows": row, "queries": queries}
        label = f"AttentionMaps, {loss.__name__}, {rule}, {row}, queries {queries}"
        yield label, Case(partial(_maps, **options), row)
    for of, row, queries in product(
        (("query", "key", "value"), ("value",)), ("supervised", "valid"), (None, 2)
    ):
        options = {"of": of, "rows": row, "queries": queries}
        label = f"Relations, {'+'.join(of)}, {row}, queries {queries}"
        yield label, Case(partial(_relations, **options), row)


def _maps(layers: Any, **options: Any) -> AttentionMaps:
    return AttentionMaps(layers=layers, **options)


def _relations(layers: Any, **options: Any) -> Relations:
    return Relations(layers=layers, **options)


def contrast_cases() -> Iterator[tuple[str, Case]]:
    for items, row, (label, options) in product(
        ("token", "pooled"),
        ("supervised", "valid"),
        {"plain": {}, "skip": {"skip": 1}, "most": {"most": 3}, "queue": {"queue": 5}}.items(),
    ):
        made: Any = partial(_contrast, items=items, rows=row, embedding=4, **options)
        known = Case(
            made,
            row,
            pulls=False,
            adds_up=False,
            draws="most" in options,
            least=1 if "queue" in options else 2,
        )
        yield f"Contrastive, {items}, {row}, {label}", known


def _contrast(layers: Any, **options: Any) -> Contrastive:
    return Contrastive(layers=layers, **options)


EVERY = dict([*hidden_cases(), *map_cases(), *contrast_cases()])


def each(chosen: Callable[[str, Case], bool] = lambda *_: True) -> pytest.MarkDecorator:
    kept = {name: case for name, case in EVERY.items() if chosen(name, case)}
    return pytest.mark.parametrize("case", kept.values(), ids=kept.keys())


def plan_of(case: Case) -> QueryPlan | None:
    objective = case.objective()
    return (
        QueryPlan(objective.queries, objective.rows)
        if isinstance(objective, AttentionMaps | Relations)
        else None
    )


def term_of(case: Case) -> tuple[Term, QueryPlan | None]:
    plan = plan_of(case)
    return bound(case.objective(), plan=plan), plan


def value(term: Term, given: Scene) -> Tensor:
    term.eval()  # nothing is kept for the next step, as a queue would
    found: Tensor = term(given.student, given.teacher, given.batch, STEP)
    return found


def slopes(term: Term, given: Scene) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the gradient of what it depends on; never the teacher's (G3)."""
    found = value(term, given)
    term.zero_grad()
    found.backward()
    assert all(target.grad is None for target in given.targets.values())
    own = {name: leaf.grad for name, leaf in given.leaves.items() if leaf.grad is not None}
    own |= {name: p.grad for name, p in term.named_parameters() if p.grad is not None}
    return found.detach(), own


def close(a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11 * scale)


LAYOUTS = [
    Layout(fill=math.nan),
    Layout(more=7, fill=1e4),
    Layout(side="right", fill=1e4),
    Layout(side="right", more=7, fill=math.nan),
]


class TestPadding:
    """G1."""

    @each()
    def test_neither_its_place_nor_its_amount_nor_what_stands_there_changes_anything(
        self, case: Case
    ) -> None:
        term, plan = term_of(case)
        clean = scene(plan=plan)
        whole, expected = slopes(term, clean)
        assert whole.isfinite()
        assert expected
        for layout in LAYOUTS:
            given = scene(layout, plan=plan)
            found, grads = slopes(term, given)
            assert close(found, whole), layout
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                if name not in given.leaves:
                    assert close(grad, expected[name]), (layout, name)
                    continue
                assert torch.equal(given.padding(grad), torch.zeros_like(given.padding(grad)))
                for k in range(len(grad)):
                    assert close(given.real(grad, k), clean.real(expected[name], k)), name


class TestIdentity:
    """G2."""

    @each(lambda name, case: case.pulls and not any(label in name for label in PROJECTED))
    def test_equal_models_read_zero_with_a_gradient_of_zero(self, case: Case) -> None:
        objective = case.objective(DIAGONAL)
        plan = plan_of(case)
        term = bound(objective, TWIN, plan=plan, identical=True)
        given = scene(student=TWIN, plan=plan, identical=True)
        found, grads = slopes(term, given)
        assert abs(found) < 1e-9
        assert grads
        assert all(grad.abs().max() < 1e-6 for grad in grads.values())


class TestAccumulation:
    """G4."""

    @each(lambda _, case: case.adds_up)
    def test_micro_batches_add_up(self, case: Case) -> None:
        term, plan = term_of(case)
        parts = [Layout(order) for order in ((0, 1), (2,), (3,))]
        whole, expected = slopes(term, scene(plan=plan))
        given = [scene(part, plan=plan) for part in parts]
        found = [slopes(term, one) for one in given]
        assert close(torch.stack([total for total, _ in found]).sum(), whole)
        count = sum(term.count(one.batch) for one in given)
        assert count == term.count(scene(plan=plan).batch)
        for name, grad in expected.items():
            if name in given[0].leaves:
                joined = torch.cat([grads[name] for _, grads in found])
            else:
                joined = torch.stack([grads[name] for _, grads in found]).sum(0)
            assert close(joined, grad), name

    @each(lambda name, case: not (case.adds_up or case.draws or name in EVEN or "queue" in name))
    def test_relations_among_a_batch_do_not(self, case: Case) -> None:
        term, plan = term_of(case)
        whole = value(term, scene(plan=plan))
        parts = [value(term, scene(Layout(order), plan=plan)) for order in ((0, 1), (2, 3))]
        assert not torch.allclose(torch.stack(parts).sum(), whole, rtol=1e-6)

    def test_that_is_documented(self) -> None:
        for objective in (HiddenStates, Contrastive):
            text = " ".join((objective.__doc__ or "").split())
            assert "change with its size" in text or "changes with its size" in text


class TestOrder:
    """G5."""

    @each(lambda _, case: not case.draws)
    def test_the_order_of_the_sequences_changes_nothing(self, case: Case) -> None:
        order = (2, 0, 3, 1)
        term, plan = term_of(case)
        straight, turned = scene(plan=plan), scene(Layout(order), plan=plan)
        whole, expected = slopes(term, straight)
        found, grads = slopes(term, turned)
        assert close(found, whole)
        for name, grad in expected.items():
            wanted = grad[list(order)] if name in straight.leaves else grad
            assert close(grads[name], wanted), name


class TestNumbers:
    """G6."""

    @each(lambda name, _: "valid" in name and "orthogonal" not in name)
    def test_the_gradient_is_that_of_the_value(self, case: Case) -> None:
        term, plan = term_of(case)
        given = scene(Layout((1, 3)), plan=plan)
        _, grads = slopes(term, given)
        leaves = [leaf for name, leaf in given.leaves.items() if name in grads]
        leaves += [p for name, p in term.named_parameters() if name in grads]

        def again(*_: Tensor) -> Tensor:
            student = said("student", STUDENT, given.leaves, given.batch)
            return value(term, replace(given, student=student))

        torch.manual_seed(0)
        assert torch.autograd.gradcheck(again, tuple(leaves), fast_mode=True)

    @each(lambda name, _: "valid" in name and "skip" not in name)
    def test_low_precision_states_are_computed_in_fp32(self, case: Case) -> None:
        term, plan = term_of(case)
        term = term.float()
        low = scene(plan=plan, dtype=torch.bfloat16)
        exact = scene(plan=plan, dtype=torch.float32)
        rounded = scene(plan=plan, dtype=torch.bfloat16)
        for signals in (rounded.student, rounded.teacher):
            object.__setattr__(signals, "states", {k: x.float() for k, x in signals.states.items()})
        found, grads = slopes(term, low)
        assert found.dtype is torch.float32
        whole = value(term, exact)
        assert torch.allclose(found, whole, rtol=4e-2, atol=1e-3)
        leaves = [grads[name] for name in low.leaves if name in grads]
        assert all(grad.dtype is torch.bfloat16 and grad.isfinite().all() for grad in leaves)
        if not plan:
            assert torch.allclose(found, value(term, rounded), rtol=1e-6)


class TestFewRows:
    """G7."""

    @each(lambda _, case: case.rows == "supervised")
    def test_no_rows_are_a_zero_with_a_graph_to_all_that_is_trained(self, case: Case) -> None:
        term, plan = term_of(case)
        given = scene(Layout(fill=math.nan, supervised="none"), plan=plan)
        found, grads = slopes(term, given)
        assert found == 0.0
        assert term.count(given.batch) == 0
        assert all(not grad.any() for grad in grads.values())
        assert all(p.grad is not None for p in term.parameters())
        assert any(name in given.leaves for name in grads)

    @each(lambda _, case: case.rows == "supervised")
    def test_one_row_is_finite_and_what_it_cannot_say_is_skipped(self, case: Case) -> None:
        term, plan = term_of(case)
        given = scene(Layout((1,), fill=math.nan, supervised="one"), plan=plan)
        found, grads = slopes(term, given)
        assert found.isfinite()
        assert all(grad.isfinite().all() for grad in grads.values())
        assert all(p.grad is not None for p in term.parameters())
        small = case.least > 1
        assert term.skipped(given.batch) == int(small)
        assert term.count(given.batch) == int(not small)
        if small:
            assert found == 0.0

    @each(lambda name, case: "sequence" in name and case.least > 1 and case.rows == "supervised")
    def test_every_small_sequence_is_counted(self, case: Case) -> None:
        term, plan = term_of(case)
        given = scene(Layout(supervised="one"), plan=plan)
        assert slopes(term, given)[0] == 0.0
        assert (term.skipped(given.batch), term.count(given.batch)) == (4, 0)
