"""What sets the reweighted divergences apart; the rest is in test_divergences, for all of them."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses import (
    adaptive_kl,
    alpha_beta,
    decoupled,
    forward_kl,
    reverse_kl,
    todi,
)
from llm_distill.losses.reweighted import GROUP, NARROW, _largest, adaptive_weight
from tests import reference
from tests.losses.catalogue import logits, slope


def probabilities(rows: int, vocabulary: int, size: float) -> tuple[Tensor, Tensor]:
    student, teacher = logits(rows, vocabulary, size=size)
    return student.detach().softmax(-1), teacher.softmax(-1)


class TestAdaptive:
    # Heads of a few tokens, of more than are looked at first, and of nearly all.
    @pytest.mark.parametrize("vocabulary", [5, 2000, GROUP * NARROW, GROUP * NARROW + 7, 20000])
    @pytest.mark.parametrize("size", [0.0, 1.0, 4.0])
    @pytest.mark.parametrize("mu", [0.01, 0.5, 0.999])
    def test_weights_match_the_reference(self, vocabulary: int, size: float, mu: float) -> None:
        student, teacher = logits(4, vocabulary, size=1.0)
        # No two tokens of the teacher alike: which one completes a head would be open.
        teacher = size * teacher + 1e-4 * torch.arange(vocabulary)
        weights = adaptive_weight(student.softmax(-1), teacher.softmax(-1), mu)
        expected = [
            reference.head_share(s, t, mu)
            for s, t in zip(student.detach().numpy(), teacher.numpy(), strict=True)
        ]
        assert weights.tolist() == pytest.approx(expected, rel=1e-9)
        assert not weights.requires_grad
        assert min(expected) > 0

    def test_rows_with_narrow_and_wide_heads_are_each_found(self) -> None:
        q, p = probabilities(6, 5000, 1.0)
        sharp = torch.log_softmax(12 * p.log(), -1).exp()
        mixed = torch.stack([p[0], sharp[1], sharp[2], p[3], sharp[4], p[5]])
        assert (mixed.topk(NARROW).values.sum(-1) < 0.5).tolist() == [1, 0, 0, 1, 0, 1]
        together = adaptive_weight(q, mixed, 0.5)
        alone = torch.cat([adaptive_weight(q[k : k + 1], mixed[k : k + 1], 0.5) for k in range(6)])
        assert torch.equal(together, alone)
        expected = [
            reference.head_share(s, t, 0.5)
            for s, t in zip(q.log().numpy(), mixed.log().numpy(), strict=True)
        ]
        assert together.tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("vocabulary", [GROUP * 5, GROUP * 5 + 1, GROUP * 100 + 31])
    def test_the_largest_are_those_of_topk(self, vocabulary: int) -> None:
        p = probabilities(50, vocabulary, 1.0)[1]
        expected, ids = p.topk(5)
        found = _largest(p, 5)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], ids)
        tied = (p * 100).round() / 100
        values, places = _largest(tied, 5)
        assert torch.equal(values, tied.topk(5).values)
        assert torch.equal(tied.gather(-1, places), values)
        assert all(len(set(row)) == 5 for row in places.tolist())

    def test_the_head_is_where_the_teacher_is_not_where_it_was_sorted(self) -> None:
        """The published mask is in sorted order, the gaps are not."""
        p = torch.tensor([[0.05, 0.15, 0.8]])
        q = torch.tensor([[0.30, 0.10, 0.6]])
        assert adaptive_weight(q, p, 0.5).item() == pytest.approx(0.2 / 0.5)
        order = torch.tensor([2, 0, 1])
        assert adaptive_weight(q[:, order], p[:, order], 0.5).item() == pytest.approx(0.2 / 0.5)

    @pytest.mark.parametrize(("mu", "head"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.85, 3)])
    def test_the_head_is_the_smallest_that_reaches_mu(self, mu: float, head: int) -> None:
        p = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
        q = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
        gaps = [0.25, 0.0, 0.125]
        assert adaptive_weight(q, p, mu).item() == pytest.approx(sum(gaps[:head]) / 0.5)

    def test_equal_models_weigh_both_alike(self) -> None:
        p = probabilities(4, 2000, 1.0)[1]
        assert adaptive_weight(p, p.clone(), 0.5).tolist() == [0.5] * 4

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_models_apart_in_head_or_tail_alone(self, share: float) -> None:
        p = torch.tensor([[0.3, 0.3, 0.2, 0.2]])
        q = torch.tensor([[0.4, 0.2, 0.2, 0.2] if share else [0.3, 0.3, 0.3, 0.1]])
        assert adaptive_weight(q, p, 0.5).item() == pytest.approx(share)

    def test_it_leaves_its_arguments_alone(self) -> None:
        q, p = probabilities(4, 500, 1.0)
        before = q.clone(), p.clone()
        adaptive_weight(q, p, 0.5)
        assert torch.equal(q, before[0])
        assert torch.equal(p, before[1])

    def test_it_lies_between_the_kls(self) -> None:
        student, teacher = logits(rows=100)
        both = torch.stack([forward_kl(student, teacher), reverse_kl(student, teacher)])
        values = adaptive_kl(student, teacher)
        assert (both.amin(0) - 1e-12 <= values).all()
        assert (values <= both.amax(0) + 1e-12).all()

    @pytest.mark.parametrize("mu", [-0.1, 0.0, 1.0, 1.5, math.nan])
    def test_refuses_a_mass_outside(self, mu: float) -> None:
        with pytest.raises(ValueError, match=r"adaptive_kl: mu=.* is outside \(0, 1\); .*0\.5"):
            adaptive_kl(*logits(), mu=mu)


class TestAlphaBeta:
    def test_its_members(self) -> None:
        student, teacher = logits()
        q, p = student.detach().softmax(-1), teacher.softmax(-1)
        members = {
            (1.0, 0.0): forward_kl(student, teacher),
            (0.0, 1.0): reverse_kl(student, teacher),
            (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
            (1.0, 1.0): (p - q).square().sum(-1) / 2,
            (2.0, -1.0): ((p - q).square() / q).sum(-1) / 2,
            (-1.0, 2.0): ((p - q).square() / p).sum(-1) / 2,
            (0.0, 0.0): (p.log() - q.log()).square().sum(-1) / 2,
            (1.0, -1.0): (p / q - 1 - (p / q).log()).sum(-1),  # Itakura-Saito
        }
        for (alpha, beta), expected in members.items():
            assert expected.min() > 1e-3
            torch.testing.assert_close(
                alpha_beta(student, teacher, alpha=alpha, beta=beta), expected
            )

    @pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.0, 0.4), (0.6, -0.6), (1.5, -0.5)])
    def test_models_and_exponents_swap_together(self, alpha: float, beta: float) -> None:
        student, teacher = logits()
        torch.testing.assert_close(
            alpha_beta(student, teacher, alpha=alpha, beta=beta),
            alpha_beta(teacher, student, alpha=beta, beta=alpha),
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("small", [1e-3, -1e-3, 1e-5, 1e-7, -1e-10, 1e-15, 1e-19, 1e-21, 1e-40])
    @pytest.mark.parametrize(
        ("at", "along"),
        [
            ((0.7, 0.0), (0.0, 1.0)),
            ((0.0, 0.7), (1.0, 0.0)),
            ((0.5, -0.5), (0.0, 1.0)),
            ((-0.5, 0.5), (0.0, 1.0)),
            ((0.0, 0.0), (1.0, 0.0)),
            ((0.0, 0.0), (0.4, 1.0)),
            ((0.0, 0.0), (1.0, -1.0)),
        ],
    )
    def test_it_is_continuous_at_its_limits(
        self,
        dtype: torch.dtype,
        small: float,
        at: tuple[float, float],
        along: tuple[float, float],
    ) -> None:
        student, teacher = (z.detach().to(dtype) for z in logits(size=1.0))
        limit = partial(alpha_beta, alpha=at[0], beta=at[1])
        near = partial(alpha_beta, alpha=at[0] + small * along[0], beta=at[1] + small * along[1])
        # Around (0, 0) the worst is the root of the precision: there the limit takes over.
        rounding = 30 * torch.finfo(dtype).eps ** (0.5 if at == (0.0, 0.0) else 1.0)
        most = 10 * abs(small) + rounding
        torch.testing.assert_close(
            near(student, teacher), limit(student, teacher), rtol=most, atol=most
        )
        torch.testing.assert_close(
            slope(near, student, teacher), slope(limit, student, teacher), rtol=most, atol=most
        )

    @pytest.mark.parametrize(
        ("alpha", "beta"),
        [
            (0.2, 0.7),
            (0.0, 0.0),
            (0.5, -0.5),
            (-0.5, 0.5),
            (-0.3, -0.1),
            (-1.0, 0.0),
            (0.0, -1.0),
            (2.0, -1.0),
            (3.0, 2.0),
            (1e-30, 0.5),
            (0.5, 1e-30),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_hostile_logits_read_large_or_small_never_nan(
        self, alpha: float, beta: float, dtype: torch.dtype
    ) -> None:
        ways = [0.0, 1e4, -1e4, -math.inf]
        rows = torch.tensor([[0.0, a, b] for a in ways for b in ways], dtype=dtype)
        student, teacher = rows.repeat(len(rows), 1), rows.repeat_interleave(len(rows), 0)
        values = alpha_beta(student, teacher, alpha=alpha, beta=beta)
        assert values.isfinite().all()
        assert values.min() >= -1e-6
        same = (student == teacher).all(-1)
        assert values[same].abs().max() <= 1e-6
        gradient = slope(partial(alpha_beta, alpha=alpha, beta=beta), student, teacher)
        assert gradient.isfinite().all()
        assert gradient[same].abs().max() <= 1e-5

    @pytest.mark.parametrize(
        ("alpha", "beta", "who"),
        [
            (1.0, 0.0, "student"),
            (0.0, 1.0, "teacher"),
            (0.5, -0.5, "student"),
            (0.5, -0.5, "teacher"),
            (-0.3, -0.1, "student"),
            (-0.3, -0.1, "teacher"),
            (0.0, 0.0, "student"),
            (-1.0, 0.0, "teacher"),
            (0.0, -1.0, "student"),
        ],
    )
    def test_the_infinite_ones_read_large(self, alpha: float, beta: float, who: str) -> None:
        student, teacher = (z.detach().float() for z in logits())
        (student if who == "student" else teacher)[:, 3] = -math.inf
        assert alpha_beta(student, teacher, alpha=alpha, beta=beta).min() > 1e20

    @pytest.mark.parametrize(("alpha", "beta"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 0)])
    def test_refuses_what_is_not_finite(self, alpha: float, beta: float) -> None:
        with pytest.raises(ValueError, match=r"alpha_beta: alpha=.*, beta=.*; both must be finite"):
            alpha_beta(*logits(), alpha=alpha, beta=beta)


class TestTodi:
    def test_its_value_is_the_sum_of_both_kls(self) -> None:
        student, teacher = logits(rows=100)
        both = forward_kl(student, teacher) + reverse_kl(student, teacher)
        torch.testing.assert_close(todi(student, teacher), both)

    def test_its_gradient_is_not(self) -> None:
        student, teacher = logits()
        both = slope(forward_kl, student, teacher) + slope(reverse_kl, student, teacher)
        assert (slope(todi, student, teacher) - both).abs().max() > 0.1

    def test_underrated_tokens_get_the_forward_kl(self) -> None:
        student = torch.tensor([[-10.0, 0.0, 0.0]], dtype=torch.float64)
        teacher = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)
        q, p = student.softmax(-1), teacher.softmax(-1)
        share = p / (p + q)
        # As in the paper: dl/dq of the mixed sum with the shares as constants.
        a = -share * p + (1 - share) * q * (1 - (p / q).log())
        expected = a - q * a.sum(-1, keepdim=True)
        torch.testing.assert_close(slope(todi, student, teacher), expected)
        assert share[0, 0] > 0.999


class TestDecoupled:
    @staticmethod
    def sample(rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher = logits(rows)
        return student, teacher, torch.arange(rows) * 2 % 9

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 8.0)])
    def test_matches_the_reference(self, alpha: float, beta: float) -> None:
        student, teacher, labels = self.sample()

        def naive(s: reference.Array) -> reference.Array:
            return reference.decoupled(s, teacher.numpy(), labels.tolist(), alpha, beta)

        loss = partial(decoupled, labels=labels, alpha=alpha, beta=beta)
        expected = torch.from_numpy(naive(student.detach().numpy()))
        assert expected.min() > 1e-5
        assert expected.max() > 0.1
        torch.testing.assert_close(
            loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-13
        )
        slopes = torch.from_numpy(reference.gradient(naive, student.detach().numpy()))
        assert slopes.abs().max() > 1e-2
        torch.testing.assert_close(slope(loss, student, teacher), slopes, rtol=1e-8, atol=1e-9)
        assert torch.autograd.gradcheck(loss, (student, teacher.requires_grad_()))

    def test_a_part_by_the_mass_of_the_rest_is_the_forward_kl(self) -> None:
        student, teacher, labels = self.sample(50)
        target = decoupled(student, teacher, labels, beta=0.0)
        rest = decoupled(student, teacher, labels, alpha=0.0)
        mass = 1 - teacher.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        torch.testing.assert_close(target + mass * rest, forward_kl(student, teacher))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_models_read_zero_with_a_zero_gradient(self, dtype: torch.dtype) -> None:
        same = logits(vocabulary=1000)[1].to(dtype)
        loss = partial(decoupled, labels=torch.arange(5))
        assert loss(same, same).tolist() == [0.0] * 5
        assert slope(loss, same, same).abs().max() <= 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_sure_label_leaves_the_rest_exact(self, dtype: torch.dtype) -> None:
        """1 - p(label) is 0 in floating point there, and the distribution of the rest is not."""
        student, teacher, labels = self.sample()
        student, teacher = student.detach(), teacher.clone()
        rest = decoupled(student, teacher, labels, alpha=0.0)
        for z in (student, teacher):
            z.scatter_(-1, labels[:, None], 200.0)
        sure = student.to(dtype), teacher.to(dtype), labels
        torch.testing.assert_close(decoupled(*sure, alpha=0.0).double(), rest, rtol=1e-5, atol=1e-6)
        assert decoupled(*sure, beta=0.0).abs().max() < 1e-30
        loss = partial(decoupled, labels=labels)
        assert slope(loss, *sure[:2]).isfinite().all()
        assert slope(loss, *sure[:2]).abs().max() > 1e-2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_hostile_logits_stay_finite(self, dtype: torch.dtype) -> None:
        ways = [0.0, 1e4, -1e4, -math.inf]
        rows = torch.tensor([[0.0, a, b] for a in ways for b in ways], dtype=dtype)
        student, teacher = rows.repeat(len(rows), 1), rows.repeat_interleave(len(rows), 0)
        same = (student == teacher).all(-1)
        for label in range(3):
            loss = partial(decoupled, labels=torch.full((len(student),), label))
            values, gradient = loss(student, teacher), slope(loss, student, teacher)
            assert values.isfinite().all()
            assert gradient.isfinite().all()
            assert values.min() >= -1e-6
            assert values[same].abs().max() == 0.0

    def test_tokens_both_forbid_do_not_exist(self) -> None:
        student, teacher, labels = self.sample()
        barred = [
            torch.cat([z.detach(), torch.full((5, 2), -math.inf)], 1) for z in (student, teacher)
        ]
        loss = partial(decoupled, labels=labels)
        torch.testing.assert_close(loss(*barred), loss(student, teacher).detach())
        gradient = slope(loss, *barred)
        torch.testing.assert_close(gradient[:, :9], slope(loss, student, teacher))
        assert gradient[:, 9:].abs().max() == 0

    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_a_token_the_student_forbids_shows(self, who: str) -> None:
        student, teacher, labels = self.sample()
        student = student.detach()
        (student if who == "student" else teacher)[:, 3] = -math.inf
        values = decoupled(student, teacher, labels)
        assert values.isfinite().all()
        assert (values > 1e20).all() == (who == "student")

    def test_one_token_leaves_nothing_to_say(self) -> None:
        labels = torch.zeros(3, dtype=torch.int64)
        assert decoupled(torch.randn(3, 1), torch.randn(3, 1), labels).tolist() == [0.0] * 3

    def test_no_rows_are_empty_with_a_graph(self) -> None:
        student = torch.zeros(0, 7, requires_grad=True)
        labels = torch.zeros(0, dtype=torch.int64)
        decoupled(student, torch.zeros(0, 7), labels).sum().backward()
        assert student.grad is not None

    @pytest.mark.parametrize(
        ("alpha", "beta"), [(-1.0, 1.0), (1.0, -0.5), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)]
    )
    def test_refuses_factors_that_say_nothing(self, alpha: float, beta: float) -> None:
        student, teacher, labels = self.sample()
        with pytest.raises(ValueError, match=r"decoupled: alpha=.*, beta=.*not both 0"):
            decoupled(student, teacher, labels, alpha=alpha, beta=beta)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_fp32(self, dtype: torch.dtype) -> None:
        student, teacher, labels = self.sample(50)
        low = student.detach().to(dtype), teacher.to(dtype)
        values = decoupled(*low, labels)
        assert values.dtype == torch.float32
        assert torch.equal(values, decoupled(low[0].float(), low[1].float(), labels))
