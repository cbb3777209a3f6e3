"""Objectives bound to two models, what they ask for, and the batches that terms see."""

from functools import partial
from typing import Any

import pytest
import torch

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits, binding, schedules
from llm_distill import heads as head_rules
from llm_distill import layers as layer_maps
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.objectives import QueryPlan
from llm_distill.queries import Queries
from llm_distill.signals import ModelSpec, Request
from tests import tiny

STUDENT = ModelSpec("student", "llama", 2, 32, 4, 128)
TEACHER = ModelSpec("teacher", "llama", 4, 64, 8, 128)
EVERYTHING = (CrossEntropy(weight=0.1), Logits(), HiddenStates(), AttentionMaps())


def bind(*objectives: Any, seed: int = 0) -> Any:
    return binding.bind(objectives, STUDENT, TEACHER, seed=seed)


class TestBind:
    def test_terms_have_the_names_of_the_log(self) -> None:
        terms = bind(*EVERYTHING, Logits())
        assert [*terms] == ["CrossEntropy", "Logits", "HiddenStates", "AttentionMaps", "Logits.2"]

    def test_trained_parts_come_from_the_seed_alone(self) -> None:
        torch.manual_seed(1)
        first = dict(bind(HiddenStates())["HiddenStates"].named_parameters())
        torch.manual_seed(2)
        again = dict(bind(HiddenStates())["HiddenStates"].named_parameters())
        other = dict(bind(HiddenStates(), seed=1)["HiddenStates"].named_parameters())
        assert first
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)

    def test_the_random_numbers_of_others_stay_as_they_are(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        bind(HiddenStates())
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize(
        ("objectives", "message"),
        [
            ((), "the list is empty"),
            ((Logits(weight=0.0),), "every weight is 0"),
            ((Logits(name="a"), CrossEntropy(name="a")), "two are named 'a'"),
            (
                (HiddenStates(layers=partial(layer_maps.explicit, pairs=[[3, 1]])),),
                r"student layer 3 is out of range 0\.\.2",
            ),
            (
                (AttentionMaps(layers=partial(layer_maps.explicit, pairs=[[1, 0]])),),
                r"teacher: block 0 is out of range 1\.\.4",
            ),
            (
                (AttentionMaps(queries=4), AttentionMaps(queries=8)),
                r"AttentionMaps and AttentionMaps.2 ask for different query rows \(4 supervised, 8",
            ),
        ],
    )
    def test_what_does_not_fit_is_bad_input(
        self, objectives: tuple[Any, ...], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            bind(*objectives)


class TestRequests:
    def test_the_union_of_what_the_terms_ask(self) -> None:
        assert binding.teacher_request(bind(*EVERYTHING)) == Request(
            True, frozenset({2, 4}), frozenset({2, 4})
        )
        assert binding.teacher_request(bind(CrossEntropy())) == Request()
        assert binding.teacher_request(bind(HiddenStates(layers=layer_maps.skip))) == Request(
            hidden=frozenset({2})
        )

    def test_only_what_needs_data_is_surveyed(self) -> None:
        random = HiddenStates(init="random")
        plain = (CrossEntropy(), Logits(), random, AttentionMaps())
        assert binding.survey(plain, STUDENT, TEACHER) == (Request(), Request())
        fitted = HiddenStates(init="least_squares", layers=layer_maps.last)
        matched = AttentionMaps(heads=head_rules.match)
        assert binding.survey((Logits(), fitted, matched), STUDENT, TEACHER) == (
            Request(False, frozenset({2}), frozenset({1, 2})),
            Request(False, frozenset({4}), frozenset({2, 4})),
        )

    def test_one_plan_of_queries_serves_all_terms(self) -> None:
        assert binding.query_plan(bind(Logits())) is None
        terms = bind(AttentionMaps(queries=4), AttentionMaps(queries=4, heads=head_rules.group))
        assert binding.query_plan(terms) == QueryPlan(4, "supervised")

    def test_whether_valid_rows_are_needed(self) -> None:
        assert not binding.needs_valid(bind(*EVERYTHING))
        assert binding.needs_valid(bind(HiddenStates(rows="valid")))
        assert binding.needs_valid(bind(AttentionMaps(rows="valid")))


class TestDescribe:
    def test_objectives_weights_maps_and_parameters(self) -> None:
        falling = partial(schedules.linear, start=1.0, end=0.0)
        objectives = (
            CrossEntropy(weight=0.1),
            Logits(temperature=2.0),
            HiddenStates(weight=falling, layers=layer_maps.uniform),
        )
        assert binding.describe(objectives, bind(*objectives)).splitlines() == [
            "CrossEntropy: weight 0.1",
            "Logits: weight 1 · forward_kl, temperature 2, scaling T2",
            "HiddenStates: weight linear(start=1.0, end=0.0) · mse, normalize layer, "
            "supervised rows",
            "  student layer | teacher layer   uniform",
            "              1 | 2 of 4",
            "              2 | 4 of 4",
            "  projectors: least squares, decided at calibration",
            "  4,224 trained parameters, not part of the exported student",
        ]

    def test_what_is_not_decided_yet_is_said(self) -> None:
        objectives = (AttentionMaps(heads=head_rules.match),)
        assert "  heads: matched, decided at calibration" in binding.describe(
            objectives, bind(*objectives)
        )


class TestMakeBatch:
    def collated(self, *, valid: bool = True) -> dict[str, Any]:
        collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=valid)
        data = tiny.rows(4)
        return collate([data[k] for k in range(4)])

    def queries(self, **changes: Any) -> Queries:
        given: dict[str, Any] = {"plan": QueryPlan(3, "valid"), "seed": 0, "epoch": 0, **changes}
        found = binding.make_batch(self.collated(), given.pop("plan"), **given).queries
        assert found is not None
        return found

    def test_models_see_inputs_and_nothing_else(self) -> None:
        collated = self.collated()
        batch = binding.make_batch(collated, None, seed=0, epoch=0)
        assert sorted(batch.inputs) == ["attention_mask", "input_ids"]
        assert batch.queries is None
        assert batch.valid is not None
        assert batch.supervised.per_sequence == collated["rows"].per_sequence

    def test_queries_depend_on_seed_and_epoch(self) -> None:
        first = self.queries().position
        assert torch.equal(first, self.queries().position)
        assert not torch.equal(first, self.queries(seed=1).position)
        assert not torch.equal(first, self.queries(epoch=1).position)

    def test_queries_are_drawn_among_the_rows_of_the_plan(self) -> None:
        rows = self.collated()["rows"]
        everything = self.queries(plan=QueryPlan(None, "supervised"))
        assert everything.per_sequence == rows.per_sequence
        assert len(self.queries()) == 4 * 3

    @pytest.mark.parametrize("keep", [0, 1, 3, 4])
    def test_only_the_first_sequences_count(self, keep: int) -> None:
        collated = self.collated()
        plan = QueryPlan(3, "valid")
        batch = binding.make_batch(collated, plan, seed=0, epoch=0, keep=keep)
        assert len(batch.inputs["input_ids"]) == 4
        assert batch.supervised.per_sequence == collated["rows"].per_sequence[:keep]
        assert batch.valid is not None
        assert batch.valid.per_sequence == collated["valid"].per_sequence[:keep]
        assert batch.queries is not None
        whole = self.queries()
        assert batch.queries.per_sequence == (*whole.per_sequence[:keep], *[0] * (4 - keep))
        assert batch.queries.position[:keep].tolist() == whole.position[:keep].tolist()

    @pytest.mark.parametrize("keep", [None, 0, 2])
    def test_the_teachers_own_batch_has_the_same_sequences(self, keep: int | None) -> None:
        collated, other = self.collated(), self.collated()
        given = collated | {"theirs": other}
        batch = binding.make_batch(given, QueryPlan(3, "valid"), seed=5, epoch=2, keep=keep)
        theirs = batch.for_teacher
        assert theirs is batch.theirs
        assert sorted(batch.inputs) == sorted(theirs.inputs) == ["attention_mask", "input_ids"]
        assert theirs.valid is not None
        assert theirs.valid.per_sequence == other["valid"].per_sequence[:keep]
        assert (theirs.draw.seed, theirs.draw.epoch, theirs.queries) == (5, 2, None)
        plain = binding.make_batch(collated, None, seed=5, epoch=2)
        assert plain.for_teacher is plain


def test_rows_per_chunk() -> None:
    assert binding.checked_rows(None) is None
    assert binding.checked_rows(1) == 1
    with pytest.raises(InputError, match=r"rows_per_chunk: 0; write .* from 1 on \(256\)"):
        binding.checked_rows(0)


def test_who_reads_the_students_logits() -> None:
    assert binding.reads_logits(bind(HiddenStates(), CrossEntropy()))
    assert not binding.reads_logits(bind(HiddenStates(), AttentionMaps()))
