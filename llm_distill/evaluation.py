"""Sums over a run or an evaluation, kept on the device until somebody reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import SaveStrategy

from llm_distill.errors import InputError
from llm_distill.objectives import MEASURES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import TrainingArguments


FIGURES = ("kl", "agreement", "entropy")
"""Of `MEASURES`, those that are shown as they are, in a training log as well."""

UNTOLD = ("teacher_nll", "agreement")
"""Of `MEASURES`, those that are NaN under a sparse teacher, who does not tell them."""

LOWER_IS_BETTER = re.compile(r"loss/|(kl|perplexity)$")
"""Figures of an evaluation that transformers would maximise, as all that do not end in `loss`."""


COMPARED = re.compile(r"(^|_)(kl|agreement|teacher_perplexity)$")
"""Figures of an evaluation for which both models predict the same tokens."""

OWN = ("student_nll", "entropy")
"""Of `MEASURES`, those of the student alone."""


class Tally:
    """Sums and counts of named terms; one reduction and one read when a mean is asked for.

    Args:
        names: Of the terms; the device sums may carry `MEASURES` behind them.
        device: Where the sums live.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.device = device
        # Apple's GPUs have no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self._sums = torch.zeros(len(self.names), dtype=self.dtype, device=self.device)
        self._counts = [0] * len(self.names)

    def add(self, sums: Tensor, counts: Sequence[int]) -> None:
        """One micro-batch: sums on the device, counts on the host."""
        self._sums += sums.to(self.dtype)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean of each term over all ranks, and start over; terms without items are left out.

        Args:
            reduce: Sum over ranks.
        """
        counts = torch.tensor(self._counts, dtype=self.dtype, device=self.device)
        sums, counts = reduce(torch.stack([self._sums, counts])).tolist()
        self.reset()
        return {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}


def known(means: Mapping[str, float]) -> dict[str, float]:
    """Without what a sparse teacher does not tell.

    >>> known({"kl": 0.5, "agreement": float("nan")})
    {'kl': 0.5}
    """
    return {k: v for k, v in means.items() if k not in UNTOLD or not math.isnan(v)}


def evaluation_metrics(
    means: Mapping[str, float], weights: Mapping[str, float], prefix: str
) -> dict[str, float]:
    """What an evaluation logs.

    Args:
        means: Of terms, and of `MEASURES` where they were taken.
        weights: Of terms, at the end of their schedules: a decaying weight must not make the loss
            fall by itself.
        prefix: `eval`, as transformers names it.

    >>> evaluation_metrics({"Logits": 0.5, "kl": 0.25}, {"Logits": 2.0}, "eval")
    {'eval_loss': 1.0, 'eval_loss/Logits': 0.5, 'eval_kl': 0.25}
    """
    means = known(means)
    metrics = {
        f"{prefix}_loss": sum(weights[name] * means[name] for name in weights if name in means)
    }
    metrics |= {f"{prefix}_loss/{name}": means[name] for name in weights if name in means}
    for name, key in (("student_nll", "perplexity"), ("teacher_nll", "teacher_perplexity")):
        if name in means:
            metrics[f"{prefix}_{key}"] = math.exp(min(means[name], 700.0))
    metrics |= {f"{prefix}_{name}": means[name] for name in FIGURES if name in means}
    return metrics


def settle_best_metric(
    args: TrainingArguments, evaluation: object, *, compared: bool, itself: bool = False
) -> None:
    """KL to the teacher, of the first dataset where there are several, unless one was named.

    Args:
        args: Changed in place.
        evaluation: One dataset, or several under names.
        compared: Whether an evaluation compares the two models' tokens; without, it is the loss.
        itself: Whether the teacher is the student itself: nearest to it is who learned least, so
            that it is the loss, too.

    Raises:
        InputError: For a figure that was named and that there is not.
    """
    metric = args.metric_for_best_model
    if metric == "loss" or (metric is None and args.save_strategy == SaveStrategy.BEST):
        # What transformers fills in where nothing was said; `eval_loss` says it explicitly.
        first = next(iter(evaluation), None) if isinstance(evaluation, Mapping) else None
        figure = "kl" if compared and not itself else "loss"
        args.metric_for_best_model = f"eval_{figure}" if first is None else f"eval_{first}_{figure}"
        args.greater_is_better = False
    elif metric is not None and not compared and COMPARED.search(metric):
        raise InputError(
            f"metric_for_best_model is {metric!r}, and nothing compares the tokens of two models: "
            "there is one, or they have different tokenizers; write eval_loss, or eval_perplexity "
            "for the student's"
        )
    elif metric is not None and LOWER_IS_BETTER.search(metric):
        args.greater_is_better = False


def own_sequences(accelerator: Accelerator, sequences: int) -> int | None:
    """Sequences of the last batch that Accelerate did not repeat for even ranks; None: all.

    A stream has no length, so there its repeats count: evaluate one on a single rank.

    Args:
        accelerator: Of the run.
        sequences: Of this batch.
    """
    state: Any = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0 or accelerator.num_processes == 1:
        return None
    real = int(state.remainder) - int(accelerator.process_index) * sequences
    return min(sequences, max(0, real))


__all__ = [
    "FIGURES",
    "MEASURES",
    "OWN",
    "Tally",
    "evaluation_metrics",
    "known",
    "own_sequences",
    "settle_best_metric",
]
