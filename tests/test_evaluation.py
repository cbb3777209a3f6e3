"""Sums and counts over an evaluation, and the figures made of them."""

import math

import pytest
import torch
from torch import Tensor

from llm_distill.evaluation import MEASURES, Tally, evaluation_metrics

CPU = torch.device("cpu")


def alone(values: Tensor) -> Tensor:
    """One rank."""
    return values


class TestTally:
    def test_the_mean_is_over_items_not_over_batches(self) -> None:
        tally = Tally(("a", "b"), CPU)
        tally.add(torch.tensor([6.0, 1.0]), [3, 1])
        tally.add(torch.tensor([2.0, 0.0]), [1, 0])
        assert tally.means(alone) == {"a": 2.0, "b": 1.0}

    def test_terms_without_items_are_left_out(self) -> None:
        tally = Tally(("a", "b"), CPU)
        tally.add(torch.tensor([6.0, 0.0]), [3, 0])
        assert tally.means(alone) == {"a": 2.0}

    def test_asking_starts_over(self) -> None:
        tally = Tally(("a",), CPU)
        tally.add(torch.tensor([6.0]), [3])
        tally.means(alone)
        assert tally.means(alone) == {}
        tally.add(torch.tensor([5.0]), [1])
        assert tally.means(alone) == {"a": 5.0}

    def test_ranks_are_summed_once(self) -> None:
        tally = Tally(("a", "b"), CPU)
        tally.add(torch.tensor([6.0, 4.0]), [3, 1])
        seen: list[Tensor] = []

        def two_ranks(values: Tensor) -> Tensor:
            seen.append(values)
            return values + torch.tensor([[2.0, 0.0], [1.0, 0.0]])

        assert tally.means(two_ranks) == {"a": 2.0, "b": 4.0}
        assert len(seen) == 1

    def test_many_small_batches_lose_nothing(self) -> None:
        tally = Tally(("a",), CPU)
        tally.add(torch.tensor([2.0**24]), [1])
        for _ in range(64):
            tally.add(torch.tensor([1.0]), [1])
        assert tally.means(alone) == {"a": (2.0**24 + 64) / 65}

    def test_apples_gpus_have_no_float64(self) -> None:
        # No such device here; its sums are what matters, and `meta` stands in for its memory.
        tally = Tally(("a",), torch.device("meta"))
        assert tally.dtype is torch.float64
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tally, "reset", lambda self: None)
            assert Tally(("a",), torch.device("mps")).dtype is torch.float32

    def test_as_many_counts_as_names(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            Tally(("a", "b"), CPU).add(torch.zeros(2), [1])


MEANS = {
    "Logits": 0.5,
    "CrossEntropy": 3.0,
    "student_nll": 2.0,
    "teacher_nll": 1.0,
    "kl": 0.25,
    "agreement": 0.75,
}


class TestMetrics:
    def test_all_figures(self) -> None:
        weights = {"Logits": 2.0, "CrossEntropy": 0.1}
        got = evaluation_metrics(MEANS, weights, "eval")
        assert got == {
            "eval_loss": pytest.approx(1.3),
            "eval_loss/Logits": 0.5,
            "eval_loss/CrossEntropy": 3.0,
            "eval_perplexity": pytest.approx(math.e**2),
            "eval_teacher_perplexity": pytest.approx(math.e),
            "eval_kl": 0.25,
            "eval_agreement": 0.75,
        }

    def test_the_prefix_is_transformers_own(self) -> None:
        assert evaluation_metrics({"Logits": 0.5}, {"Logits": 1.0}, "test") == {
            "test_loss": 0.5,
            "test_loss/Logits": 0.5,
        }

    def test_a_term_without_items_counts_nothing(self) -> None:
        got = evaluation_metrics({"Logits": 0.5}, {"Logits": 1.0, "HiddenStates": 1.0}, "eval")
        assert got == {"eval_loss": 0.5, "eval_loss/Logits": 0.5}

    def test_a_hopeless_student_has_a_finite_perplexity(self) -> None:
        got = evaluation_metrics({"student_nll": 1e6}, {}, "eval")
        assert math.isfinite(got["eval_perplexity"])

    def test_every_measure_is_told(self) -> None:
        got = evaluation_metrics(dict.fromkeys(MEASURES, 1.0), {}, "eval")
        assert len(got) == 1 + len(MEASURES)
