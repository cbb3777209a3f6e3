"""Terms that autograd differentiates, and terms on a few tokens, against the whole computation."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses import alpha_beta, decoupled, forward_kl, jsd, reverse_kl, todi, tvd
from llm_distill.losses.gathered import Coarse, coarse_score, differentiate, sampled_score
from llm_distill.losses.pairs import Scratch
from llm_distill.losses.rowwise import Tempered
from llm_distill.losses.sparse import Counts, TopK, coarsen, sampled_kl
from tests.losses.catalogue import every_loss, logits

N, V, K = 6, 11, 4
LABELS = torch.tensor([0, 3, 5, 7, 9, 10])


def scratch(dtype: torch.dtype = torch.float64) -> Scratch:
    return Scratch(N * V, dtype, torch.device("cpu"))


def by_autograd(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.detach().requires_grad_()
    values = function(at)
    return values.detach(), torch.autograd.grad(values.sum(), at)[0]


def summed(found: Coarse) -> tuple[Tensor, Tensor | None]:
    """Values and gradient, as whoever adds it up makes it of its parts."""
    if found.scale is None:
        return found.values, None
    return found.values, (found.rest * found.scale).scatter_add(-1, found.ids, found.kept)


def places(ids: Tensor) -> Tensor:
    """Where each label is among the kept tokens; at their end if it is none."""
    rows = zip(LABELS.tolist(), ids.tolist(), strict=True)
    return torch.tensor([row.index(label) if label in row else len(row) for label, row in rows])


class TestDifferentiate:
    def test_values_and_slope(self) -> None:
        student, teacher = logits(N, V)
        term = Tempered(decoupled, temperature=2.0)
        expected = by_autograd(lambda z: term(z, teacher, LABELS), student)
        values, slope = differentiate(term, student.detach(), teacher, LABELS, wanted=True)
        assert slope is not None
        assert not values.requires_grad
        torch.testing.assert_close((values, slope), expected)

    def test_under_no_grad_as_well(self) -> None:
        student, teacher = logits(N, V)
        with torch.no_grad():
            slope = differentiate(Tempered(), student, teacher, LABELS, wanted=True)[1]
        assert slope is not None
        assert slope.abs().max() > 1e-3

    def test_what_is_only_measured_builds_no_graph(self) -> None:
        seen = []

        def spy(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
            del teacher, labels
            seen.append((student.requires_grad, torch.is_grad_enabled()))
            return student.sum(-1)

        student, teacher = logits(N, V)
        values, slope = differentiate(spy, student, teacher, LABELS, wanted=False)
        assert slope is None
        assert seen == [(False, False)]
        torch.testing.assert_close(values, student.detach().sum(-1))

    def test_a_function_of_the_teacher_has_no_slope(self) -> None:
        student, teacher = logits(N, V)

        def of_teacher(z: Tensor, t: Tensor | None, labels: Tensor) -> Tensor:
            del z, labels
            assert t is not None
            return t.sum(-1)

        values, slope = differentiate(of_teacher, student, teacher, LABELS, wanted=True)
        assert slope is None
        assert torch.equal(values, teacher.sum(-1))

    def test_a_slope_that_is_no_number_shows_in_the_value(self) -> None:
        """The square root of 0 has a value and no slope: its row is at fault, not the head."""
        student, teacher = (z.detach().clone() for z in logits(N, V))
        student[2, 3] = -1e30

        def root(z: Tensor, t: Tensor | None, labels: Tensor) -> Tensor:
            del labels
            assert t is not None
            return (z.softmax(-1).sqrt() - t.softmax(-1).sqrt()).square().sum(-1)

        values, slope = differentiate(root, student, teacher, LABELS, wanted=True)
        assert slope is not None
        assert values.isnan().tolist() == [row == 2 for row in range(N)]
        assert torch.equal(values[:2], root(student, teacher, LABELS)[:2])
        assert slope.isfinite().all(-1).tolist() == [row != 2 for row in range(N)]

    def test_the_students_own_graph_is_left_alone(self) -> None:
        student, teacher = logits(N, V)
        differentiate(Tempered(), student, teacher, LABELS, wanted=True)
        assert student.grad is None


class TestCoarse:
    def check(self, term: Tempered, k: int = K) -> None:
        student, teacher = logits(N, V)
        target = TopK.of(teacher, k)

        def whole(z: Tensor) -> Tensor:
            coarse = coarsen(z, target.ids), target.targets()
            return replace(term, width=None)(*coarse, places(target.ids))

        expected = by_autograd(whole, student)
        z = student.detach().clone()
        found = summed(coarse_score(term, z, target, LABELS, scratch(), wanted=True))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(z, student)

    @every_loss
    @pytest.mark.parametrize("k", [1, V - 1])
    def test_every_divergence(self, loss: Callable[..., Tensor], k: int) -> None:
        self.check(Tempered(loss, temperature=1.5, factor=2.0), k)

    @pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jsd, todi, tvd, alpha_beta])
    @pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
    def test_without_a_tail_nothing_is_merged(
        self, loss: Callable[..., Tensor], temperature: float
    ) -> None:
        """A tail with the least mass a number can be has e^-21 at temperature 4: it is left out."""
        term = Tempered(loss, temperature=temperature)
        self.check(term, V)
        student, teacher = (z.detach() for z in logits(N, V))
        target = TopK.of(teacher, V)
        found = coarse_score(term, student, target, LABELS, scratch(), wanted=True)
        dense = by_autograd(lambda z: term(z, teacher, LABELS), student)
        torch.testing.assert_close(summed(found), dense, rtol=1e-10, atol=1e-12)

    def test_the_label_is_found_among_the_kept_tokens(self) -> None:
        kept = places(TopK.of(logits(N, V)[1], K).ids)
        assert K in kept.tolist()
        assert (kept < K).any()
        self.check(Tempered(partial(decoupled, beta=0.5)))

    def test_a_width_is_of_the_whole_vocabulary(self) -> None:
        """K + 1 tokens are not cut to it."""
        self.check(Tempered(jsd, width=3))

    def test_a_moving_target_moves_among_the_kept_tokens(self) -> None:
        self.check(Tempered(jsd, mix=torch.tensor(0.3), temperature=2.0))

    def test_a_thin_tail_is_summed_not_subtracted(self) -> None:
        """1 - sum of the others would be 0 in fp32, and its logarithm -inf."""
        student = torch.tensor([[40.0, 0.0, 0.0, 1.0]])
        target = TopK.of(torch.tensor([[5.0, 1.0, 1.0, 0.0]]), 1)
        given = student, target, torch.tensor([0]), Scratch(4, torch.float32, torch.device("cpu"))
        values, slope = summed(coarse_score(Tempered(), *given, wanted=True))
        expected = by_autograd(
            lambda z: forward_kl(coarsen(z, target.ids), target.targets().double()),
            student.double(),
        )
        torch.testing.assert_close(values.double(), expected[0], rtol=1e-5, atol=0)
        assert slope is not None
        torch.testing.assert_close(slope.double(), expected[1], rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("size", [500.0, 1e4])
    def test_a_tail_below_all_numbers_still_learns(self, size: float) -> None:
        """Its mass underflows; its logarithm and the gradient within it do not."""
        student = torch.tensor([[size, 0.0, 0.0, 1.0]])
        target = TopK.of(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 1)
        given = student, target, torch.tensor([0]), Scratch(4, torch.float32, torch.device("cpu"))
        values, slope = summed(coarse_score(Tempered(), *given, wanted=True))
        expected = by_autograd(
            lambda z: forward_kl(coarsen(z, target.ids), target.targets().double()),
            student.double(),
        )
        assert values.item() > size / 3
        torch.testing.assert_close(values.double(), expected[0], rtol=1e-5, atol=0)
        assert slope is not None
        torch.testing.assert_close(slope.double(), expected[1], rtol=1e-5, atol=1e-7)

    def test_a_tail_the_student_forbids_shows(self) -> None:
        student = torch.tensor([[1.0, -1e30, -1e30, -1e30]])
        target = TopK.of(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 1)
        given = student, target, torch.tensor([0]), Scratch(4, torch.float32, torch.device("cpu"))
        assert coarse_score(Tempered(), *given, wanted=False)[0].item() > 1e20

    def test_what_has_no_slope_gives_none(self) -> None:
        student, teacher = logits(N, V)
        target = TopK.of(teacher, K)
        for term, wanted in ((Tempered(lambda s, t: t.sum(-1)), True), (Tempered(), False)):
            given = student.detach(), target, LABELS, scratch()
            values, slope = summed(coarse_score(term, *given, wanted=wanted))
            assert slope is None
            assert values.isfinite().all()


class TestSampled:
    def test_values_and_slope(self) -> None:
        student, teacher = logits(N, V)
        generator = torch.Generator().manual_seed(0)
        target = Counts.sample(teacher, 7, generator=generator)
        assert (target.counts == 0).any()  # rows that are filled up with a token of their own
        term = Tempered(factor=3.0)
        z = student.detach().clone()
        found = summed(sampled_score(term, z, target, scratch()))
        expected = by_autograd(lambda at: 3.0 * sampled_kl(at, target), student)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(z, student)

    def test_a_drawn_token_the_student_forbids_shows(self) -> None:
        target = Counts(torch.tensor([[1]]), torch.tensor([[5]]), draws=5)
        student = torch.tensor([[0.0, -1e30, 1.0]])
        box = Scratch(3, torch.float32, torch.device("cpu"))
        values, slope = summed(sampled_score(Tempered(), student, target, box))
        assert values.item() == pytest.approx(1e30)
        assert slope is not None
        assert slope.isfinite().all()
        assert math.isclose(slope.sum().item(), 0.0, abs_tol=1e-6)


def test_a_loss_of_ones_own_sees_both_sides_normalised() -> None:
    """Equal models have equal coarse logits: a squared distance is 0 as it is on whole ones."""
    z = torch.randn(4, 9, dtype=torch.float64)
    term = Tempered(lambda s, t: (s - t).square().mean(-1))
    given = z.clone(), TopK.of(z, 3), torch.zeros(4, dtype=torch.long), scratch()
    values, slope = summed(coarse_score(term, *given, wanted=True))
    assert values.abs().max() < 1e-20
    assert slope is not None
    assert slope.abs().max() < 1e-10
