"""Attention maps, against eager attention of the whole models."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill import AttentionMaps as Spec
from llm_distill import heads as head_rules
from llm_distill import layers as layer_maps
from llm_distill import map_kl, map_mse
from llm_distill.attention import Heads
from llm_distill.layers import LayerMap, Row
from llm_distill.objectives import QueryPlan, map_pass
from llm_distill.objectives.maps import AttentionMapsTerm
from llm_distill.rows import Batch, Draw
from llm_distill.signals import ModelSpec, Request
from tests import tiny
from tests.objectives.compare import (
    STEP,
    batch,
    eager_maps,
    evidence,
    specs,
    value,
)

AttentionMaps = partial(Spec, layers=layer_maps.uniform)

FAMILIES = {
    "llama": lambda: (tiny.llama("student"), tiny.llama("teacher")),
    "qwen3": lambda: (tiny.llama("student"), tiny.qwen3(depth=4)),
    "gpt2": lambda: (tiny.gpt2(depth=2), tiny.gpt2(depth=4)),
    "gemma3": lambda: (tiny.llama("student"), tiny.gemma3(depth=4)),
}


def weights_of(given: Batch) -> Tensor:
    """What each sampled query row stands for."""
    assert given.queries is not None
    return given.queries.weight.flatten()[given.queries.flat]


class TestAttentionMaps:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("loss", [map_kl, map_mse])
    @pytest.mark.parametrize("heads", [head_rules.mean, head_rules.group])
    def test_it_is_what_eager_attention_says(self, family: str, loss: Any, heads: Any) -> None:
        student, teacher = FAMILIES[family]()
        term = AttentionMaps(loss=loss, heads=heads, queries=5).build(*specs(student, teacher))
        given = batch(term.queries)
        ours, theirs = eager_maps(student, given), eager_maps(teacher, given)
        weights = weights_of(given)
        expected = sum(
            (loss(*heads(ours[s - 1], theirs[t - 1])) * weights).sum() for s, t in [(1, 2), (2, 4)]
        )
        got = value(term, student, teacher, given)
        assert torch.allclose(got, torch.as_tensor(expected) / 2, rtol=1e-4)
        assert given.queries is not None
        assert term.count(given) == given.queries.total > len(given.queries) > 0

    @pytest.mark.parametrize("plan", [QueryPlan(3, "valid"), QueryPlan(None, "supervised")])
    def test_rows_are_drawn_as_written(
        self, plan: QueryPlan, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        objective = AttentionMaps(queries=plan.most, rows=plan.rows)
        assert objective.build(*specs(student, teacher)).queries == plan

    @pytest.mark.parametrize("heads", ["mean", "match"])
    def test_chunks_of_queries_change_nothing(
        self,
        heads: str,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        objective = AttentionMaps(heads=getattr(head_rules, heads), queries=None, rows="valid")
        term = objective.build(*specs(student, teacher))
        given = batch(term.queries)
        assert given.queries is not None
        assert given.queries.position.shape[1] > 6
        width = given.inputs["input_ids"].shape[1]
        results = []
        monkeypatch.setattr(map_pass, "LEAST_ROWS", 1)
        for places in (128, 6, 1):
            monkeypatch.setitem(map_pass.BLOCK, "cpu", places * 12 * width)
            student.zero_grad()
            got = value(term, student, teacher, given)
            got.backward()
            grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            results.append((got.detach(), grads))
        whole, slopes = results[0]
        assert sum(bool(slope.any()) for slope in slopes) > 4
        for got, grads in results[1:]:
            assert torch.allclose(got, whole, rtol=1e-6)
            for a, b in zip(grads, slopes, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_only_the_maps_of_a_chunk_exist(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(map_pass, "LEAST_ROWS", 4)
        monkeypatch.setitem(map_pass.BLOCK, "cpu", 1)
        widths = []

        def record(s: Tensor, t: Tensor) -> Tensor:
            widths.append(len(s))
            return map_kl(s, t)

        term = AttentionMaps(loss=record, queries=None, rows="valid").build(
            *specs(student, teacher)
        )
        given = batch(term.queries)
        widths.clear()
        value(term, student, teacher, given)
        assert sum(widths) == 2 * term.count(given)
        assert max(widths) <= 4

    def test_no_rows_are_a_zero_with_a_graph(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = AttentionMaps().build(*specs(student, teacher))
        got = value(term, student, teacher, batch(term.queries, empty=(0, 1, 2, 3)))
        assert got.item() == 0.0
        got.backward()
        assert term.count(batch(term.queries, empty=(0, 1, 2, 3))) == 0

    def test_a_model_is_at_no_distance_from_itself(self, teacher: PreTrainedModel) -> None:
        for rule in (head_rules.mean, head_rules.group):
            term = AttentionMaps(heads=rule).build(*specs(teacher, copy.deepcopy(teacher)))
            got = value(term, teacher, copy.deepcopy(teacher), batch(term.queries))
            assert abs(got.item()) < 1e-4


class TestMixtures:
    @pytest.mark.parametrize("rule", [head_rules.mean, head_rules.group])
    def test_targets_are_mixed_after_the_head_rule(
        self, rule: Any, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        rows = (Row(1, ((2, 0.75), (3, 0.25)), 2.0), Row(2, ((4, 1.0),), 1.0))
        objective = AttentionMaps(heads=rule, layers=LayerMap(rows, 2, 4, "test"), queries=5)
        term = objective.build(*specs(student, teacher))
        given = batch(term.queries)
        ours, theirs = eager_maps(student, given), eager_maps(teacher, given)
        low, two = rule(ours[0], theirs[1])
        target = 0.75 * two + 0.25 * rule(ours[0], theirs[2])[1]
        weights = weights_of(given)
        first = (map_kl(low, target) * weights).sum()
        last = (map_kl(*rule(ours[1], theirs[3])) * weights).sum()
        got = value(term, student, teacher, given)
        assert torch.allclose(got, (2 * first + last) / 3, rtol=1e-4)

    def test_heads_are_matched_for_each_block_of_a_mixture(self) -> None:
        teacher = tiny.gpt2(depth=3)
        rows = (Row(1, ((2, 0.5), (3, 0.5))), Row(2, ((1, 1.0),)))
        mapping = LayerMap(rows, 3, 3, "test")
        objective = AttentionMaps(heads=head_rules.match, layers=mapping, queries=6, rows="valid")
        shown = evidence(objective, teacher, teacher, batch(QueryPlan(6, "valid")))
        term = objective.build(*specs(teacher, teacher), shown)
        assert isinstance(term, AttentionMapsTerm)
        chosen = cast("Tensor", term.assignment)
        assert chosen.shape == (3, 4)
        for entry, (s, t) in enumerate([(1, 2), (1, 3), (2, 1)]):
            assert f"heads of {s} -> heads of {t}: {chosen[entry].tolist()}" in term.notes
        given = shown.batch
        every = eager_maps(teacher, given)
        mixed = 0.5 * every[1][:, chosen[0]] + 0.5 * every[2][:, chosen[1]]
        weights = weights_of(given)
        expected = (map_kl(every[0], mixed) * weights).sum()
        expected = expected + (map_kl(every[1], every[0][:, chosen[2]]) * weights).sum()
        got = term(shown.student, shown.teacher, given, STEP)
        assert torch.allclose(got, expected / 2, rtol=1e-4)

    def test_trained_shares_are_refused(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        mapping = LayerMap((Row(2, ((2, 0.5), (4, 0.5))),), 2, 4, "learned", trained=True)
        with pytest.raises(ValueError, match=r"AttentionMaps: layers has shares that are trained"):
            AttentionMaps(layers=mapping).build(*specs(student, teacher))

    def test_a_map_that_is_drawn_anew(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        """Each epoch has its own blocks, and all of the teacher's are read."""
        objective = AttentionMaps(layers=layer_maps.random, queries=4)
        term = objective.build(*specs(student, teacher))
        assert term.teacher == Request(heads=frozenset({1, 2, 3, 4}))
        found = set()
        for epoch in range(4):
            given = replace(batch(term.queries), draw=Draw(epoch=epoch))
            fixed = partial(layer_maps.random, epoch=epoch)
            same = AttentionMaps(layers=fixed, queries=4).build(*specs(student, teacher))
            got = value(term, student, teacher, given)
            assert torch.equal(got, value(same, student, teacher, given))
            found.add(got.item())
        assert len(found) > 1
        with pytest.raises(ValueError, match="heads: match is decided for the blocks of one map"):
            AttentionMaps(layers=layer_maps.random, heads=head_rules.match).build(
                *specs(student, teacher)
            )


def permuted(heads: Heads, order: Sequence[int], keys: Sequence[int]) -> Heads:
    """The same attention with its heads in another order."""
    return replace(heads, query=heads.query[:, list(order)], key=heads.key[:, list(keys)])


class TestMatchedHeads:
    OBJECTIVE = AttentionMaps(heads=head_rules.match, queries=6, rows="valid")

    def test_a_planted_permutation_is_found(self) -> None:
        teacher = tiny.gpt2(depth=3)
        plan = QueryPlan(6, "valid")
        shown = evidence(self.OBJECTIVE, teacher, teacher, batch(plan))
        # Student head i is teacher head order[i], in each block in another order.
        orders = {1: [2, 0, 3, 1], 2: [3, 2, 1, 0], 3: [0, 1, 2, 3]}
        planted = {k: permuted(shown.student.heads(k), o, o) for k, o in orders.items()}
        shown = replace(shown, student=replace(shown.student, attention=planted))
        term = self.OBJECTIVE.build(*specs(teacher, teacher), shown)
        assert isinstance(term, AttentionMapsTerm)
        assert cast("Tensor", term.assignment).tolist() == list(orders.values())
        assert term.notes[-3:] == tuple(
            f"heads of {k} -> heads of {k}: {order}" for k, order in orders.items()
        )
        got = term(shown.student, shown.teacher, shown.batch, STEP)
        assert abs(got.item()) < 1e-4

    def test_fewer_heads_choose_among_more(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        shown = evidence(self.OBJECTIVE, student, teacher, batch(QueryPlan(6, "valid")))
        first, again = (self.OBJECTIVE.build(*specs(student, teacher), shown) for _ in range(2))
        chosen = cast("Tensor", first.assignment)
        assert torch.equal(chosen, cast("Tensor", again.assignment))
        assert chosen.shape == (2, 4)
        assert all(len(set(row)) == 4 for row in chosen.tolist())
        given = shown.batch
        ours, theirs = eager_maps(student, given), eager_maps(teacher, given)
        expected = sum(
            (map_kl(ours[s - 1], theirs[t - 1][:, chosen[k]]) * weights_of(given)).sum()
            for k, (s, t) in enumerate([(1, 2), (2, 4)])
        )
        got = value(first, student, teacher, given)
        assert torch.allclose(got, torch.as_tensor(expected) / 2, rtol=1e-4)

    def test_the_assignment_is_saved(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        shown = evidence(self.OBJECTIVE, student, teacher, batch(QueryPlan(6, "valid")))
        decided = self.OBJECTIVE.build(*specs(student, teacher), shown)
        later = self.OBJECTIVE.build(*specs(student, teacher))
        assert later.notes[-1] == "heads: matched, decided at calibration"
        later.load_state_dict(decided.state_dict())
        assert torch.equal(cast("Tensor", later.assignment), cast("Tensor", decided.assignment))

    def test_a_calibration_batch_without_rows_is_refused(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        given = batch(QueryPlan(6, "supervised"), empty=(0, 1, 2, 3))
        shown = evidence(self.OBJECTIVE, student, teacher, given)
        with pytest.raises(ValueError, match=r"AttentionMaps: .* no row to calibrate on"):
            self.OBJECTIVE.build(*specs(student, teacher), shown)

    def test_it_surveys_its_blocks(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        assert self.OBJECTIVE.survey(*specs(student, teacher)) == (
            Request(heads=frozenset({1, 2})),
            Request(heads=frozenset({2, 4})),
        )
        assert AttentionMaps().survey(*specs(student, teacher)) == (Request(), Request())


class TestAttentionMapsRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows": "all"}, "AttentionMaps: rows is 'all'; write one of supervised, valid"),
            ({"queries": 0}, "AttentionMaps: queries is 0; write a number >= 1, or null"),
        ],
    )
    def test_settings(self, changes: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AttentionMaps(**changes)

    @pytest.mark.parametrize("pair", [[0, 1], [1, 0]])
    def test_the_embedding_has_no_heads(self, pair: list[int], student: PreTrainedModel) -> None:
        objective = AttentionMaps(layers=partial(layer_maps.explicit, pairs=[pair]))
        with pytest.raises(ValueError, match=r"block 0 is out of range 1\.\.2"):
            objective.build(*specs(student, student))

    def test_head_counts_that_do_not_fit(self) -> None:
        three, eight = (ModelSpec("m", "llama", 2, 8, heads, 16) for heads in (3, 8))
        with pytest.raises(ValueError, match="heads: group needs one head count to divide"):
            AttentionMaps(heads=head_rules.group).build(three, eight)
        with pytest.raises(ValueError, match="heads: match gives each student head a teacher"):
            AttentionMaps(heads=head_rules.match).build(eight, three)

    def test_it_is_described(self) -> None:
        assert AttentionMaps().describe() == "map_kl, heads mean, 128 supervised rows"
        everything = AttentionMaps(loss=map_mse, heads=head_rules.group, queries=None, rows="valid")
        assert everything.describe() == "map_mse, heads group, all valid rows"
