"""Merged tails against the full divergences, and sampled targets against their expectation."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from llm_distill import coarsen, forward_kl
from llm_distill.losses.softmax import FLOOR
from llm_distill.losses.sparse import Counts, TopK, sampled_kl
from tests import reference
from tests.losses.catalogue import CASES, Case, every_case, logits, slope

MERGING = {name: case for name, case in CASES.items() if case.merges}


def top(teacher: Tensor, k: int) -> Tensor:
    return teacher.topk(k, -1).indices


class TestCoarsen:
    @pytest.mark.parametrize("k", [1, 3, 8])
    def test_matches_the_reference(self, k: int) -> None:
        student, teacher = logits()
        ids = top(teacher, k)
        expected = reference.coarsen(student.detach().numpy(), ids.tolist())
        coarse = coarsen(student, ids)
        torch.testing.assert_close(coarse.detach(), torch.from_numpy(expected))
        torch.testing.assert_close(coarse.exp().sum(-1).detach(), torch.ones(5).double())
        assert torch.autograd.gradcheck(lambda s: coarsen(s, ids), (student,))

    def test_its_result_is_logits_again(self) -> None:
        student, teacher = logits()
        coarse = coarsen(student, top(teacher, 3))
        torch.testing.assert_close(coarse.log_softmax(-1), coarse)

    def test_a_thin_tail_keeps_its_digits(self) -> None:
        row = torch.tensor([[0.0, -40.0, -41.0]])
        expected = math.log(math.exp(-40) + math.exp(-41))
        assert coarsen(row, torch.tensor([[0]]))[0, 1].item() == pytest.approx(expected, rel=1e-6)

    def test_an_empty_tail_has_no_mass_and_no_gradient(self) -> None:
        student, teacher = logits()
        ids = top(teacher, 9)
        coarse = coarsen(student, ids)
        assert coarse[:, -1].tolist() == [FLOOR] * 5
        torch.testing.assert_close(
            slope(lambda s, t: forward_kl(coarsen(s, ids), coarsen(t, ids)), student, teacher),
            slope(forward_kl, student, teacher),
        )

    @pytest.mark.parametrize("barred", [[8], [0], [0, 8], [5, 6, 7, 8]])
    def test_forbidden_tokens_among_kept_and_others(self, barred: list[int]) -> None:
        rows = logits()[1]
        rows[:, barred] = -math.inf
        ids = torch.arange(5).repeat(5, 1)
        coarse = coarsen(rows.requires_grad_(), ids)
        assert coarse.isfinite().all()
        probabilities = rows.softmax(-1)
        merged = torch.cat([probabilities[:, :5], probabilities[:, 5:].sum(-1, keepdim=True)], -1)
        torch.testing.assert_close(coarse.exp(), merged)
        gradient = torch.autograd.grad(coarse[:, 1].sum(), rows)[0]
        assert gradient.isfinite().all()

    def test_half_precision_is_computed_in_fp32(self) -> None:
        rows = logits()[1].bfloat16()
        assert torch.equal(coarsen(rows, top(rows, 3)), coarsen(rows.float(), top(rows, 3)))

    @pytest.mark.parametrize("k", [0, 10])
    def test_refuses_too_few_and_too_many(self, k: int) -> None:
        ids = torch.zeros(5, k, dtype=torch.int64)
        with pytest.raises(
            ValueError, match=rf"coarsen: {k} tokens to keep of a vocabulary of 9; .* from 1 to 9"
        ):
            coarsen(logits()[1], ids)


class TestDivergences:
    @pytest.mark.parametrize("case", MERGING.values(), ids=MERGING.keys())
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_coarse_is_at_most_full_on_every_row(self, case: Case, dtype: torch.dtype) -> None:
        student, teacher = (z.detach().to(dtype) for z in logits(rows=100, vocabulary=40))
        full = case.loss(student, teacher)
        assert full.min() > 1e-2
        before = torch.zeros_like(full)
        most = 1e-12 if dtype == torch.float64 else 2e-5
        for k in (1, 4, 16, 38, 39):
            ids = top(teacher, k)
            coarse = case.loss(coarsen(student, ids), coarsen(teacher, ids))
            assert (coarse <= full * (1 + most) + most).all()
            assert (coarse >= before * (1 - most) - most).all()  # more tokens see more
            before = coarse

    def test_those_said_to_bound_nothing_do_not(self) -> None:
        student, teacher = (z.detach() for z in logits(rows=300, vocabulary=12))
        ids = top(teacher, 2)
        for name in ("alpha_beta(1.0, 1.0)", "adaptive_kl(0.5)"):
            loss = CASES[name].loss
            excess = loss(coarsen(student, ids), coarsen(teacher, ids)) - loss(student, teacher)
            assert excess.max() > 1e-3, name

    @every_case
    def test_exact_with_all_but_one_token(self, case: Case) -> None:
        student, teacher = logits()
        ids = top(teacher, 8)
        torch.testing.assert_close(
            case.loss(coarsen(student, ids), TopK.of(teacher, 8).targets()),
            case.loss(student, teacher),
        )
        torch.testing.assert_close(
            slope(lambda s, t: case.loss(coarsen(s, ids), coarsen(t, ids)), student, teacher),
            slope(case.loss, student, teacher),
        )

    def test_the_gradient_of_the_coarse_forward_kl(self) -> None:
        """q - p on the kept tokens, q (1 - tail of p / tail of q) on all others."""
        student, teacher = logits()
        kept = TopK.of(teacher, 3)
        q, p = student.detach().softmax(-1), teacher.softmax(-1)
        tail_q = 1 - q.gather(-1, kept.ids).sum(-1, keepdim=True)
        tail_p = 1 - p.gather(-1, kept.ids).sum(-1, keepdim=True)
        expected = q * (1 - tail_p / tail_q)
        expected.scatter_(-1, kept.ids, (q - p).gather(-1, kept.ids))
        found = slope(lambda s, t: forward_kl(coarsen(s, kept.ids), t), student, kept.targets())
        torch.testing.assert_close(found, expected)


class TestTopK:
    def test_keeps_the_likeliest(self) -> None:
        teacher = logits(vocabulary=20)[1]
        kept = TopK.of(teacher, 4)
        expected, ids = teacher.log_softmax(-1).topk(4)
        assert torch.equal(kept.ids, ids)
        torch.testing.assert_close(kept.log_probs, expected)
        torch.testing.assert_close(kept.tail.exp(), 1 - expected.exp().sum(-1))
        torch.testing.assert_close(kept.targets(), coarsen(teacher, ids))
        assert len(kept) == 5

    def test_what_was_stored_in_less_is_normalised_again(self) -> None:
        kept = TopK.of(logits(vocabulary=20)[1], 4)
        stored = TopK(kept.ids, kept.log_probs.half(), kept.tail.half())
        targets = stored.targets()
        assert targets.dtype == torch.float32
        assert (
            stored.log_probs.double().exp().sum(-1) + stored.tail.double().exp() - 1
        ).abs().max() > 1e-5
        torch.testing.assert_close(
            targets.double().exp().sum(-1), torch.ones(5).double(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(targets.double(), kept.targets(), atol=1e-2, rtol=0)

    def test_an_empty_tail(self) -> None:
        kept = TopK.of(logits()[1], 9)
        assert kept.tail.tolist() == [FLOOR] * 5
        assert kept.targets()[:, -1].exp().tolist() == [0.0] * 5
        nothing = TopK(kept.ids, kept.log_probs, torch.full((5,), -math.inf))
        assert torch.equal(nothing.targets(), kept.targets())

    def test_rows_and_devices(self) -> None:
        kept = TopK.of(logits()[1].requires_grad_(), 3)
        assert not kept.targets().requires_grad
        part = kept.rows(slice(1, 3)).to("cpu")
        assert len(part) == 2
        assert torch.equal(part.targets(), kept.targets()[1:3])
        assert kept.to("meta").tail.device.type == "meta"
        assert len(kept.rows(slice(5, 9))) == 0

    @pytest.mark.parametrize("k", [-1, 0, 10])
    def test_refuses_too_few_and_too_many(self, k: int) -> None:
        with pytest.raises(
            ValueError, match=rf"TopK: {k} tokens to keep of a vocabulary of 9; .* from 1 to 9"
        ):
            TopK.of(logits()[1], k)

    def test_refuses_tensors_that_do_not_belong_together(self) -> None:
        kept = TopK.of(logits()[1], 3)
        with pytest.raises(ValueError, match=r"TopK: ids \[5, 3\] with log_probs \[5, 2\] and"):
            TopK(kept.ids, kept.log_probs[:, :2], kept.tail)
        with pytest.raises(ValueError, match=r"tail \[5, 1\]; they must be"):
            TopK(kept.ids, kept.log_probs, kept.tail[:, None])
        with pytest.raises(ValueError, match=r"of torch.int32; .*write ids.long\(\)"):
            TopK(kept.ids.int(), kept.log_probs, kept.tail)


class TestCounts:
    def test_counts_are_those_of_the_draws(self) -> None:
        teacher = logits(rows=20, vocabulary=30, size=2.0)[1]
        found = Counts.sample(teacher, 50, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        drawn = teacher.softmax(-1).multinomial(50, replacement=True, generator=generator)
        assert len(found) == 20
        assert found.counts.sum(-1).tolist() == [50] * 20
        widest = 0
        for row, ids, counts in zip(
            drawn.tolist(), found.ids.tolist(), found.counts.tolist(), strict=True
        ):
            real = {i: c for i, c in zip(ids, counts, strict=True) if c}
            assert real == Counter(row)
            padding = [i for i, c in zip(ids, counts, strict=True) if not c]
            assert set(padding) <= set(row)
            widest = max(widest, len(real))
        assert found.ids.shape == found.counts.shape == (20, widest)

    def test_counts_follow_the_probabilities(self) -> None:
        teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]]).log()
        draws = 100_000
        found = Counts.sample(teacher, draws, generator=torch.Generator().manual_seed(1))
        shares = torch.zeros(5).index_add(0, found.ids[0], found.counts[0] / draws)
        p = teacher.exp()[0]
        assert ((shares - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()

    def test_unlikely_tokens_are_not_lost(self) -> None:
        """A tail of 2^20 tokens with 1e-7 each is a tenth of the mass, and drawn as often."""
        tail = torch.full((1, 1 << 20), 1e-7)
        teacher = torch.cat([torch.tensor([[1 - tail.double().sum().item()]]), tail], 1).log()
        draws = 20_000
        found = Counts.sample(teacher, draws, generator=torch.Generator().manual_seed(2))
        share = found.counts[found.ids > 0].sum().item() / draws
        expected = tail.double().sum().item()
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws)

    @pytest.mark.parametrize("draws", [1, 2, 4])
    def test_the_expected_gradient_is_the_full_one(self, draws: int) -> None:
        """All outcomes of all draws, weighed by their probability: no sampling error."""
        student, teacher = logits(rows=1, vocabulary=3, seed=3)
        p = teacher.softmax(-1)[0].tolist()
        expected, mass, value = torch.zeros(1, 3).double(), 0.0, 0.0
        for outcome in itertools.product(range(3), repeat=draws):
            weight = math.prod(p[token] for token in outcome)
            drawn = Counter(outcome)
            counts = Counts(
                torch.tensor([list(drawn)]), torch.tensor([list(drawn.values())]), draws
            )
            part = sampled_kl(student, counts).sum()
            expected += weight * torch.autograd.grad(part, student)[0]
            mass += weight
            value += weight * part.item()
        assert mass == pytest.approx(1)
        full = slope(forward_kl, student, teacher)
        assert full.abs().max() > 0.1
        torch.testing.assert_close(expected, full, rtol=0, atol=1e-12)
        assert value > forward_kl(student, teacher).item() + 1e-2

    def test_its_value_is_the_kl_of_the_shares(self) -> None:
        student, teacher = logits(vocabulary=12)
        counts = Counts.sample(teacher, 6, generator=torch.Generator().manual_seed(3))
        shares = torch.zeros(5, 12).double().scatter_add(-1, counts.ids, counts.counts.double() / 6)
        torch.testing.assert_close(sampled_kl(student, counts), forward_kl(student, shares.log()))
        torch.testing.assert_close(
            slope(lambda s, _: sampled_kl(s, counts), student, teacher),
            student.detach().softmax(-1) - shares,
        )

    def test_rows_and_devices(self) -> None:
        student, teacher = logits()
        counts = Counts.sample(teacher, 10, generator=torch.Generator().manual_seed(4))
        part = counts.rows(slice(1, 3)).to("cpu")
        assert len(part) == 2
        torch.testing.assert_close(sampled_kl(student[1:3], part), sampled_kl(student, counts)[1:3])
        assert counts.to("meta").counts.device.type == "meta"

    def test_no_rows(self) -> None:
        counts = Counts.sample(torch.zeros(0, 7), 10)
        assert counts.ids.shape == (0, 1)
        assert sampled_kl(torch.zeros(0, 7), counts).shape == (0,)

    def test_forbidden_tokens_are_never_drawn(self) -> None:
        teacher = torch.tensor([[0.0, -math.inf, 0.0]]).repeat(50, 1)
        assert (Counts.sample(teacher, 20).ids != 1).all()

    @pytest.mark.parametrize("draws", [0, -3])
    def test_refuses_to_draw_nothing(self, draws: int) -> None:
        with pytest.raises(ValueError, match=rf"Counts: draws={draws}; write .*such as 50"):
            Counts.sample(logits()[1], draws)

    def test_refuses_tensors_that_do_not_belong_together(self) -> None:
        ids = torch.zeros(2, 3, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"Counts: ids \[2, 3\] with counts \[2, 4\]"):
            Counts(ids, torch.ones(2, 4), 4)
        with pytest.raises(ValueError, match=r"Counts: ids are \[3\] of torch.int64"):
            Counts(ids[0], torch.ones(3), 4)


class TestBeside:
    @pytest.mark.parametrize("draws", [1, 3])
    def test_the_expected_gradient_is_the_full_one(self, draws: int) -> None:
        """Exact top tokens and all outcomes of all draws from the tail, by their probability."""
        student, teacher = logits(rows=1, vocabulary=5, seed=3)
        kept = TopK.of(teacher, 2)
        rest = [k for k in range(5) if k not in kept.ids[0].tolist()]
        p = teacher.softmax(-1)[0]
        tail = p[rest] / p[rest].sum()
        expected, mass = torch.zeros(1, 5).double(), 0.0
        for outcome in itertools.product(range(3), repeat=draws):
            weight = math.prod(float(tail[k]) for k in outcome)
            drawn = Counter(rest[k] for k in outcome)
            counts = Counts(
                torch.tensor([list(drawn)]), torch.tensor([list(drawn.values())]), draws
            )
            value = sampled_kl(student, counts.beside(kept)).sum()
            expected += weight * torch.autograd.grad(value, student)[0]
            mass += weight
        assert mass == pytest.approx(1)
        full = slope(forward_kl, student, teacher)
        assert full.abs().max() > 0.1
        torch.testing.assert_close(expected, full, rtol=0, atol=1e-7)

    def test_weights_sum_to_one_and_top_tokens_are_exact(self) -> None:
        teacher = logits(rows=6, vocabulary=20)[1]
        kept = TopK.of(teacher, 4)
        generator = torch.Generator().manual_seed(0)
        found = Counts.sample(teacher, 9, generator=generator, but=kept.ids).beside(kept)
        assert found.draws == 1
        torch.testing.assert_close(found.counts.sum(-1), torch.ones(6).double())
        torch.testing.assert_close(
            found.counts[:, :4], teacher.softmax(-1).gather(-1, kept.ids).detach()
        )

    def test_no_kept_token_is_drawn(self) -> None:
        teacher = 4.0 * logits(rows=50, vocabulary=12)[1]
        kept = TopK.of(teacher, 5)
        drawn = Counts.sample(teacher, 30, but=kept.ids)
        assert not (drawn.ids[:, :, None] == kept.ids[:, None, :]).any()

    def test_a_tail_of_forbidden_tokens_weighs_nothing(self) -> None:
        teacher = torch.tensor([[1.0, 0.0, -math.inf, -math.inf]])
        kept = TopK.of(teacher, 2)
        found = Counts.sample(teacher, 5, but=kept.ids).beside(kept)
        assert (found.ids[0, 2:] >= 2).all()
        assert float(found.counts[0, 2:].sum()) == 0.0
        torch.testing.assert_close(found.counts[0, :2], teacher[0, :2].softmax(-1))
