"""Hidden states, by hand from what the whole models say."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_distill import HiddenStates, cosine, mse, projectors
from llm_distill import layers as layer_maps
from llm_distill.losses import nst, pkt
from llm_distill.objectives.states import HiddenStatesTerm
from llm_distill.picks import Pick
from llm_distill.rows import RowKind
from llm_distill.signals import ModelSpec, Request
from tests.objectives.compare import EXPLICIT, batch, evidence, specs, states, value


class TestHiddenStates:
    @pytest.mark.parametrize("rows", ["supervised", "valid"])
    @pytest.mark.parametrize("normalize", ["none", "layer", "l2"])
    @pytest.mark.parametrize("loss", [mse, cosine])
    def test_it_is_what_the_models_say(
        self,
        rows: RowKind,
        normalize: Literal["none", "layer", "l2"],
        loss: Any,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
    ) -> None:
        objective = HiddenStates(loss=loss, layers=EXPLICIT, normalize=normalize, rows=rows)
        term = objective.build(*specs(student, teacher))
        assert isinstance(term, HiddenStatesTerm)
        given = batch()

        def normal(x: Tensor) -> Tensor:
            if normalize == "layer":
                centred = x - x.mean(-1, keepdim=True)
                return centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return x / x.norm(dim=-1, keepdim=True) if normalize == "l2" else x

        ours, theirs = states(student, given, rows), states(teacher, given, rows)
        expected = sum(
            loss(normal(projector(ours[s])), normal(theirs[t])).sum()
            for (s, t), projector in zip(EXPLICIT(2, 4).pairs, term.projectors, strict=True)
        )
        got = value(term, student, teacher, given)
        assert torch.allclose(got, expected / 4, rtol=1e-5)
        assert term.count(given) == len(given.rows(rows))

    def test_equal_widths_need_no_projector(self, student: PreTrainedModel) -> None:
        term = HiddenStates().build(*specs(student, student))
        assert isinstance(term, HiddenStatesTerm)
        assert [type(p) for p in term.projectors] == [nn.Identity, nn.Identity]
        assert value(term, student, student, batch()).item() == 0.0

    def test_each_pair_has_a_projector_of_its_own(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = HiddenStates(layers=EXPLICIT).build(*specs(student, teacher))
        assert sum(p.numel() for p in term.parameters()) == 4 * (32 * 64 + 64)
        assert (term.student, term.teacher) == (
            Request(hidden=frozenset({0, 1, 2})),
            Request(hidden=frozenset({1, 2, 4})),
        )
        value(term, student, teacher, batch()).backward()
        assert all(p.grad is not None and p.grad.any() for p in term.parameters())
        assert student.get_input_embeddings().weight.grad is not None

    def test_no_rows_are_a_zero_with_a_graph(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = HiddenStates().build(*specs(student, teacher))
        got = value(term, student, teacher, batch(empty=(0, 1, 2, 3)))
        assert got.item() == 0.0
        got.backward()
        assert all(p.grad is not None and not p.grad.any() for p in term.parameters())

    def test_low_precision_states_are_compared_in_fp32(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = HiddenStates().build(*specs(student, teacher))
        with torch.autocast("cpu", torch.bfloat16):
            got = value(term, student, teacher, batch())
        assert got.dtype is torch.float32

    def test_least_squares_is_the_optimum(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        objective = HiddenStates(
            init="least_squares", normalize="none", rows="valid", layers=layer_maps.last
        )
        given = batch()
        shown = evidence(objective, student, teacher, given)
        term = objective.build(*specs(student, teacher), shown)
        assert isinstance(term, HiddenStatesTerm)
        x = states(student, given, "valid")[2].double()
        y = states(teacher, given, "valid")[4].double()
        x, centred = x - x.mean(0), y - y.mean(0)
        penalty = projectors.RIDGE * x.square().sum(0).mean() * torch.eye(32).double()
        best = torch.linalg.solve(x.mT @ x + penalty, x.mT @ centred)
        expected = (centred - x @ best).square().mean(-1).sum()
        got = value(term, student, teacher, given).double()
        assert torch.allclose(got, expected, rtol=1e-5)
        variance = (y - y.mean(0)).square().sum()
        left = got * 64 / variance
        assert f"least squares on {len(x)} rows leaves {left:.1%} of the variance" in term.notes[-1]

    def test_least_squares_aim_at_what_the_loss_compares_with(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        objective = HiddenStates(init="least_squares", normalize="l2", layers=layer_maps.last)
        given = batch()
        shown = evidence(objective, student, teacher, given)
        term = objective.build(*specs(student, teacher), shown)
        assert isinstance(term, HiddenStatesTerm)
        projected = term.projectors[0](states(student, given, "supervised")[2])
        target = F.normalize(states(teacher, given, "supervised")[4], dim=-1)
        assert (projected - target).norm() < 0.5 * target.norm()

    def test_by_default_too_few_rows_leave_them_random(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        """As many features as 32 need 64 rows; asked for by name they are fitted to fewer."""
        for count, fitted in ((3, False), (12, True)):
            given = batch(count=count)
            objective = HiddenStates(layers=layer_maps.last, rows="valid")
            shown = evidence(objective, student, teacher, given)
            term = objective.build(*specs(student, teacher), shown)
            rows = len(given.rows("valid").index)
            expected = (
                f"least squares on {rows} rows leaves"
                if fitted
                else f"projectors: random, {rows} rows at calibration are too few for 32 features"
            )
            assert (rows >= 64) == fitted
            assert expected in term.notes[-1]
            asked = replace(objective, init="least_squares").build(*specs(student, teacher), shown)
            assert f"least squares on {rows} rows" in asked.notes[-1]

    def test_least_squares_are_the_same_again(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        objective = HiddenStates(init="least_squares")
        shown = evidence(objective, student, teacher, batch())
        first, again = (objective.build(*specs(student, teacher), shown) for _ in range(2))
        for a, b in zip(first.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_what_is_decided_later_says_so(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        mapped = Request(hidden=frozenset({1, 2})), Request(hidden=frozenset({2, 4}))
        for objective, expected in (
            (HiddenStates(), mapped),
            (HiddenStates(init="least_squares"), mapped),
            (HiddenStates(projector=projectors.orthogonal), mapped),
            (HiddenStates(init="random"), (Request(), Request())),
            (HiddenStates(projector=projectors.mlp), (Request(), Request())),
            (HiddenStates(loss=pkt), (Request(), Request())),
            (HiddenStates(blockwise=0.3), (Request(), Request())),  # compares states as they are
        ):
            assert objective.survey(*specs(student, teacher)) == expected
        same = ModelSpec.of(teacher.config, "teacher")
        assert HiddenStates().survey(same, same) == (Request(), Request())
        objective = HiddenStates()
        term = objective.build(*specs(student, teacher))
        assert term.notes[-1] == "projectors: least squares, decided at calibration"
        assert "student layer | teacher layer" in term.notes[0]

    @pytest.mark.parametrize(
        "projector", [None, projectors.identity, partial(nn.Linear, bias=False)]
    )
    def test_least_squares_without_linear_projectors_is_refused_before_calibration(
        self, projector: Any, student: PreTrainedModel
    ) -> None:
        objective = HiddenStates(init="least_squares", projector=projector)
        with pytest.raises(ValueError, match="no closed-form optimum; write projector: linear"):
            objective.build(*specs(student, student))

    def test_a_calibration_batch_without_rows_is_refused(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        objective = HiddenStates(init="least_squares")
        shown = evidence(objective, student, teacher, batch(empty=(0, 1, 2, 3)))
        with pytest.raises(ValueError, match=r"HiddenStates: .* no row to calibrate on"):
            objective.build(*specs(student, teacher), shown)

    @pytest.mark.parametrize("field", ["init", "normalize", "rows", "items"])
    def test_unknown_words_are_refused(self, field: str) -> None:
        wrong: Any = {field: "al"}
        with pytest.raises(ValueError, match=f"HiddenStates: {field} is 'al'; write one of"):
            HiddenStates(**wrong)

    def test_numbers_that_cannot_work_are_refused(self) -> None:
        with pytest.raises(ValueError, match="HiddenStates: skip is -1; write a number of tokens"):
            HiddenStates(skip=-1)
        with pytest.raises(ValueError, match="most is 2, and pkt needs 3 rows; write at least"):
            HiddenStates(loss=pkt, most=2)

    def test_a_loss_brings_what_it_is_meant_for(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        assert HiddenStates().choice == Pick("supervised", "token")
        assert HiddenStates(loss=nst).choice == Pick("supervised", "sequence", 0, 256, 2)
        told = HiddenStates(loss=partial(nst, kernel="linear"), items="token", most=9, skip=1)
        assert told.choice == Pick("supervised", "token", 1, 9, 2)
        term = HiddenStates(loss=pkt).build(*specs(student, teacher))
        assert isinstance(term, HiddenStatesTerm)
        assert term.normalize == "none"
        assert [type(p) for p in term.projectors] == [nn.Identity, nn.Identity]

    def test_layers_out_of_range_are_refused(self, student: PreTrainedModel) -> None:
        objective = HiddenStates(layers=partial(layer_maps.explicit, pairs=[[1, 7]]))
        with pytest.raises(ValueError, match=r"teacher layer 7 is out of range 0\.\.2"):
            objective.build(*specs(student, student))

    def test_it_is_described(self) -> None:
        assert HiddenStates(rows="valid").describe() == "mse, normalize layer, valid rows"
        assert HiddenStates(loss=nst, skip=4).describe() == (
            "nst, normalize none, supervised rows, items sequence, without the first 4 tokens, at "
            "most 256 at once"
        )
