"""What every objective and term has: names, weights, counts, and losses that are tried at once."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits, schedules
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.objectives import (
    Evidence,
    HeadTerm,
    Objective,
    QueryPlan,
    Term,
    check_objectives,
    named,
    row_wise,
)
from llm_distill.rows import Batch
from llm_distill.signals import ModelSpec, Request
from tests import tiny

SPEC = ModelSpec("m", "llama", 2, 8, 2, 16)


@dataclass(frozen=True, kw_only=True)
class Agreement(Objective):
    """An objective of somebody's own."""

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> HeadTerm:
        del student, teacher, evidence
        return row_wise(lambda s, t: (s - t).square().sum(-1))


def batch(plan: QueryPlan | None = None, *, valid: bool = True) -> Batch:
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [9, 10]}]
    collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=valid)
    return make_batch(collate(examples), plan, seed=0, epoch=0)


class TestObjective:
    @pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
    def test_impossible_weights_are_refused_at_once(self, weight: float) -> None:
        with pytest.raises(ValueError, match=r"Logits: weight is .* it must be finite and >= 0"):
            Logits(weight=weight)

    def test_a_schedule_that_goes_below_zero_is_refused(self) -> None:
        falling = partial(schedules.linear, start=1.0, end=-1.0)
        with pytest.raises(ValueError, match=r"ours: weight is -.* at progress 0.51"):
            CrossEntropy(weight=falling, name="ours")

    def test_most_need_no_calibration_and_have_no_settings(self) -> None:
        assert CrossEntropy().survey(SPEC, SPEC) == (Request(), Request())
        assert CrossEntropy().describe() == ""

    def test_one_of_somebodys_own(self) -> None:
        term = Agreement().build(SPEC, SPEC)
        values = term.values(torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3))
        assert torch.equal(values, torch.full((3,), 4.0))
        assert (term.student, term.teacher) == (Request(logits=True), Request(logits=True))


class TestTerm:
    def test_it_counts_its_rows(self) -> None:
        nothing = Request()
        assert Term(nothing, nothing).count(batch()) == 3 + 1
        assert Term(nothing, nothing, rows="valid").count(batch()) == 4 + 2
        plan = QueryPlan(2, "valid")
        assert (
            Term(nothing, nothing, queries=plan).count(batch(plan)) == 4 + 2
        )  # what a sample is for

    def test_rows_that_nobody_announced_are_not_invented(self) -> None:
        term = Term(Request(), Request(), queries=QueryPlan(None, "valid"))
        with pytest.raises(LookupError, match="no sampled queries"):
            term.count(batch())
        with pytest.raises(LookupError, match="without valid rows"):
            Term(Request(), Request(), rows="valid").count(batch(valid=False))

    def test_the_bare_contract_has_no_forward(self) -> None:
        nothing: Any = None
        with pytest.raises(NotImplementedError):
            Term(Request(), Request())(nothing, nothing, nothing, nothing)

    def test_most_do_not_hear_of_their_steps(self) -> None:
        term = Term(Request(), Request())
        assert not term.adapts
        term.after_step(torch.tensor(1.0), 0.5)
        assert not term.state_dict()

    def test_a_head_term_is_its_row_function(self) -> None:
        def gap(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
            assert teacher is not None
            return (student - teacher).abs().sum(-1)

        term = HeadTerm(gap, needs_teacher=True)
        assert term.row is gap
        given = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1])
        assert term.values(*given).tolist() == [3.0, 3.0]


class TestCheckObjectives:
    def test_an_empty_list_trains_nothing(self) -> None:
        with pytest.raises(ValueError, match="the list is empty; write at least one"):
            check_objectives([])

    def test_all_weights_zero_train_nothing(self) -> None:
        with pytest.raises(ValueError, match="every weight is 0 for the whole run"):
            check_objectives([Logits(weight=0.0), CrossEntropy(weight=lambda _: 0.0)])
        check_objectives([Logits(weight=0.0), CrossEntropy(weight=lambda p: float(p > 0.5))])

    def test_a_class_is_no_objective(self) -> None:
        wrong: Any = Logits
        with pytest.raises(ValueError, match=r"is no Objective; write one of CrossEntropy\(\)"):
            check_objectives([wrong])


class TestNamed:
    def test_two_of_one_class_have_two_names(self) -> None:
        names = [*named([Logits(), HiddenStates(), Logits(), CrossEntropy(), Logits()])]
        assert names == ["Logits", "HiddenStates", "Logits.2", "CrossEntropy", "Logits.3"]

    def test_their_own_names_win(self) -> None:
        assert [*named([Logits(name="hot"), Logits()])] == ["hot", "Logits.2"]

    def test_one_name_twice_is_refused(self) -> None:
        with pytest.raises(ValueError, match="two are named 'Logits'"):
            named([Logits(), CrossEntropy(name="Logits")])

    def test_the_figures_of_an_evaluation_are_taken(self) -> None:
        with pytest.raises(ValueError, match="one is named 'kl', as a figure of every evaluation"):
            named([Logits(name="kl")])


def test_terms_are_made_for_every_tiny_model() -> None:
    spec = ModelSpec.of(tiny.llama("student").config, "s")
    for objective in (CrossEntropy(), Logits(), HiddenStates(), AttentionMaps(), Agreement()):
        assert isinstance(objective.build(spec, spec), Term)


def test_one_objective_is_no_list() -> None:
    with pytest.raises(ValueError, match=r"a list is asked for; write \[Logits"):
        check_objectives(Logits())  # type: ignore[arg-type]  # what is refused
