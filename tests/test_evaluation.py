"""Sums and counts over an evaluation, and the figures made of them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from llm_distill.errors import InputError
from llm_distill.evaluation import (
    MEASURES,
    Tally,
    evaluation_metrics,
    own_sequences,
    settle_best_metric,
)
from tests import tiny

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
    "entropy": 1.5,
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
            "eval_entropy": 1.5,
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

    def test_what_a_sparse_teacher_does_not_tell_is_left_out(self) -> None:
        means = MEANS | {"teacher_nll": math.nan, "agreement": math.nan}
        got = evaluation_metrics(means, {"Logits": 1.0}, "eval")
        assert got.keys() >= {"eval_perplexity", "eval_kl", "eval_entropy"}
        assert not {"eval_teacher_perplexity", "eval_agreement"} & got.keys()

    def test_what_is_no_number_is_told(self) -> None:
        means = {"Logits": math.nan, "kl": math.inf, "student_nll": math.nan}
        got = evaluation_metrics(means, {"Logits": 1.0}, "eval")
        assert math.isnan(got["eval_loss"])
        assert math.isnan(got["eval_perplexity"])
        assert got["eval_kl"] == math.inf


class TestRepeatedSequences:
    """9 sequences on 2 ranks in batches of 2: the last holds one real one on rank 0."""

    @pytest.mark.parametrize(
        ("end", "remainder", "ranks", "rank", "expected"),
        [
            (False, 1, 2, 0, None),
            (True, 1, 2, 0, 1),
            (True, 1, 2, 1, 0),
            (True, 3, 2, 0, 2),
            (True, 3, 2, 1, 1),
            (True, -1, 2, 1, None),  # a stream has no length
            (True, 1, 1, 0, None),
        ],
    )
    def test_they_do_not_count(
        self, end: bool, remainder: int, ranks: int, rank: int, expected: int | None
    ) -> None:
        state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
        run: Any = SimpleNamespace(gradient_state=state, num_processes=ranks, process_index=rank)
        assert own_sequences(run, 2) == expected


class TestBestMetric:
    """Without a common vocabulary there is no KL; the rest is told in test_arguments."""

    BEST: ClassVar[dict[str, Any]] = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }

    def settled(
        self, folder: Path, evaluation: Any = None, *, compared: bool = False, **changes: Any
    ) -> TrainingArguments:
        args = tiny.arguments(folder, **changes)
        settle_best_metric(args, evaluation, compared=compared)
        return args

    def test_the_best_model_has_the_lowest_loss(self, tmp_path: Path) -> None:
        args = self.settled(tmp_path, **self.BEST)
        assert (args.metric_for_best_model, args.greater_is_better) == ("eval_loss", False)
        args = self.settled(tmp_path, {"a": 1, "b": 2}, **self.BEST)
        assert args.metric_for_best_model == "eval_a_loss"
        assert self.settled(tmp_path).metric_for_best_model is None

    @pytest.mark.parametrize(
        "metric", ["eval_loss", "eval_perplexity", "entropy", "f1", "bleu_kl2"]
    )
    def test_a_figure_that_there_is_stays(self, metric: str, tmp_path: Path) -> None:
        args = self.settled(tmp_path, metric_for_best_model=metric)
        assert args.metric_for_best_model == metric

    @pytest.mark.parametrize(
        "metric", ["kl", "eval_kl", "eval_a_kl", "agreement", "eval_teacher_perplexity"]
    )
    def test_one_that_there_is_not_is_refused(self, metric: str, tmp_path: Path) -> None:
        with pytest.raises(
            InputError,
            match=f"metric_for_best_model is '{metric}'.*different tokenizers; write "
            "eval_loss, or eval_perplexity",
        ):
            self.settled(tmp_path, metric_for_best_model=metric)
        same = self.settled(tmp_path, compared=True, metric_for_best_model=metric)
        assert same.metric_for_best_model == metric
