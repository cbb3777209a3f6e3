"""Maps from similarity to the student: planted truths, fallbacks, and marginals."""

from functools import cache

import pytest
import torch
from torch import Tensor

from llm_distill.layers import Similarity, cka, coverage, transport, uniform
from llm_distill.layers.crossed import sinkhorn
from llm_distill.layers.programmes import rising
from tests.layers import planted

TRUTHS = [(2, 9, 13, 14, 17, 24), (3, 4, 5, 9, 19, 24), (5, 8, 12, 18, 19, 24)]
UNIFORM = [t for _, t in uniform(6, 24).pairs]

planted_of = cache(planted.measure)


def found_by_cka(pair: planted.Planted) -> list[int]:
    mapping = cka(6, 24, cross=pair.cross, similarity=pair.similarity)
    return [t for _, t in mapping.pairs]


def similarity_of(values: Tensor, error: float = 1e-3) -> Similarity:
    return Similarity(values, torch.full_like(values, error))


class TestPlanted:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("noise", [1.0, 4.0])
    def test_clean_states_give_the_truth(self, seed: int, noise: float) -> None:
        truth = TRUTHS[seed]
        pair = planted_of(truth, seed, noise=noise)
        assert found_by_cka(pair) == list(truth) == planted.greedy(pair.cross)
        assert planted.error(UNIFORM, truth) > 0.5

    @pytest.mark.parametrize("seed", range(3))
    def test_sinks_hide_the_truth_and_the_cleaner_finds_it(self, seed: int) -> None:
        truth = TRUTHS[seed]
        kept = planted_of(truth, seed, sinks=True, cleaned=False)
        free = rising([row[1:] for row in kept.cross.values.tolist()[1:]])
        assert planted.error(free, truth) > 1
        assert planted.error(planted.greedy(kept.cross), truth) > 1
        assert float(kept.cross.values[1:, 1:].min()) > 0.9
        # Even then the figures are known to say nothing.
        mapping = cka(6, 24, cross=kept.cross, similarity=kept.similarity)
        assert "below 3 standard errors" in mapping.origin
        cleaned = planted_of(truth, seed, sinks=True)
        assert found_by_cka(cleaned) == list(truth)

    def test_an_order_that_does_not_rise_is_found_by_no_rising_map(self) -> None:
        truth = (17, 5, 21, 9, 13, 24)
        pair = planted_of(truth, 4)
        assert planted.greedy(pair.cross) == list(truth)
        assert planted.error(found_by_cka(pair), truth) > 1


class TestCka:
    def test_the_prior_decides_between_equals(self) -> None:
        values = torch.full((4, 10), 0.5)
        values[1:, 3::3] = 0.9
        similarity = similarity_of(torch.ones(10, 10))
        mapping = cka(3, 9, cross=similarity_of(values), similarity=similarity)
        assert mapping.pairs == ((1, 3), (2, 6), (3, 9))
        assert mapping.origin == "cka, prior 0.2"
        assert str(mapping).splitlines()[-3:] == [
            "mean similarity of the pairs: 0.9",
            "spread of similarities within rows: 0.1886",
            "standard error of a similarity: 0.001",
        ]

    def test_the_last_layers_are_paired_whatever_they_look_like(self) -> None:
        values = torch.zeros(4, 10)
        values[1, 4] = values[2, 5] = values[3, 6] = 1.0
        similarity = similarity_of(torch.ones(10, 10))
        mapping = cka(3, 9, cross=similarity_of(values), similarity=similarity, prior=0.0)
        assert mapping.pairs == ((1, 4), (2, 5), (3, 9))

    def test_noise_is_left_to_coverage(self) -> None:
        similarity = similarity_of(torch.rand(13, 13, generator=torch.Generator().manual_seed(0)))
        expected = coverage(4, 12, similarity=similarity)
        for seed in range(20):
            draw = torch.Generator().manual_seed(seed)
            noise = 0.5 + 0.02 * torch.randn(5, 13, generator=draw)
            mapping = cka(4, 12, cross=similarity_of(noise, 0.02), similarity=similarity)
            assert mapping.rows == expected.rows
            assert mapping.evidence == expected.evidence
            assert "(cka: contrast 0.0" in mapping.origin
            assert mapping.origin.startswith("coverage (")
            sure = cka(4, 12, cross=similarity_of(noise, 1e-4), similarity=similarity)
            assert "standard errors" not in sure.origin

    @pytest.mark.parametrize("depths", [(3, 8), (4, 12), (6, 24), (2, 6)])
    def test_a_student_like_the_first_layers_is_left_to_coverage(
        self, depths: tuple[int, int]
    ) -> None:
        student, teacher = depths
        values = torch.zeros(student + 1, teacher + 1)
        for s in range(student + 1):
            for t in range(teacher + 1):
                values[s, t] = 1 - 0.1 * abs(s - t)
        similarity = similarity_of(torch.ones(teacher + 1, teacher + 1))
        mapping = cka(student, teacher, cross=similarity_of(values), similarity=similarity)
        first = list(range(1, student + 1))
        assert (
            f"(cka: the student looks like the teacher's first layers, {first})" in mapping.origin
        )
        assert mapping.rows == coverage(student, teacher, similarity=similarity).rows

    def test_a_deeper_student_is_left_to_coverage(self) -> None:
        draw = torch.Generator().manual_seed(0)
        similarity = similarity_of(torch.ones(4, 4))
        cross = similarity_of(torch.rand(6, 4, generator=draw))
        mapping = cka(5, 3, cross=cross, similarity=similarity)
        assert mapping.rows == coverage(5, 3, similarity=similarity).rows
        assert "(cka: the student is deeper)" in mapping.origin

    @pytest.mark.parametrize("prior", [-0.1, float("nan"), float("inf")])
    def test_a_prior_that_cannot_be_is_refused(self, prior: float) -> None:
        square = similarity_of(torch.ones(4, 4))
        with pytest.raises(ValueError, match=f"cka has prior {prior}; write a number >= 0"):
            cka(3, 3, cross=square, similarity=square, prior=prior)
        with pytest.raises(ValueError, match=f"transport has prior {prior}; write a number >= 0"):
            transport(3, 3, cross=square, prior=prior)


class TestTransport:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 12), (12, 4), (5, 5)])
    @pytest.mark.parametrize(("epsilon", "off"), [(0.01, 1e-4), (0.05, 1e-8), (1.0, 1e-8)])
    def test_marginals_are_uniform(
        self, shape: tuple[int, int], epsilon: float, off: float
    ) -> None:
        cost = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        plan = sinkhorn(cost, epsilon)
        assert (plan >= 0).all()
        rows, columns = (torch.full((n,), 1 / n, dtype=torch.float64) for n in shape)
        torch.testing.assert_close(plan.sum(1), rows, atol=off, rtol=0)
        torch.testing.assert_close(plan.sum(0), columns, atol=1e-12, rtol=0)

    def test_the_plan_has_the_form_of_the_optimum(self) -> None:
        """exp(-cost / epsilon) scaled by rows and columns: all 2 x 2 cross ratios are its own."""
        cost = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).double()
        gap = sinkhorn(cost, 0.1).log() + cost / 0.1
        ratio = gap[1:, 1:] + gap[:-1, :-1] - gap[1:, :-1] - gap[:-1, 1:]
        assert float(ratio.abs().max()) < 1e-9

    def test_no_entropy_is_the_assignment(self) -> None:
        from scipy.optimize import linear_sum_assignment

        cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
        _, best = linear_sum_assignment(cost.numpy())
        assert sinkhorn(cost, 0.002).argmax(1).tolist() == best.tolist()

    def test_a_tiny_epsilon_does_not_underflow(self) -> None:
        plan = sinkhorn(torch.rand(3, 8, generator=torch.Generator().manual_seed(3)), 1e-4)
        assert plan.isfinite().all()
        torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64))

    def test_rows_are_mixtures_of_neighbours(self) -> None:
        mapping = transport(3, 9, cross=similarity_of(torch.full((4, 10), 0.5)), epsilon=0.005)
        assert [row.student for row in mapping.rows] == [1, 2, 3]
        for s, row in enumerate(mapping.rows, start=1):
            largest = sorted(sorted(row.teacher, key=lambda entry: -entry[1])[:3])
            assert [t for t, _ in largest] == [3 * s - 2, 3 * s - 1, 3 * s]
            assert all(share >= 0.01 for _, share in row.teacher)
        assert mapping.evidence[0][0] == "cost of the transport"

    def test_every_teacher_block_is_used(self) -> None:
        """What a greedy choice does not give: here all student layers look like block 2."""
        values = torch.full((4, 7), 0.2)
        values[:, 2] = 0.9
        mapping = transport(3, 6, cross=similarity_of(values))
        assert mapping.teacher_layers == set(range(1, 7))

    def test_small_shares_are_dropped_and_the_rest_sums_to_one(self) -> None:
        values = torch.eye(7) * 0.9
        mapping = transport(6, 6, cross=similarity_of(values))
        assert all(row.teacher == ((row.student, 1.0),) for row in mapping.rows)

    def test_one_block_takes_all_of_a_deep_teacher_alike(self) -> None:
        """Each share is below the limit of 1 %, and none is dropped."""
        mapping = transport(1, 200, cross=similarity_of(torch.full((2, 201), 0.5)))
        assert len(mapping.rows[0].teacher) == 200

    @pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_epsilon_that_cannot_be_is_refused(self, epsilon: float) -> None:
        with pytest.raises(
            ValueError, match=f"transport has epsilon {epsilon}; write a number > 0"
        ):
            transport(3, 3, cross=similarity_of(torch.ones(4, 4)), epsilon=epsilon)
