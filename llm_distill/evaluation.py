"""Sums over a run or an evaluation, kept on the device until somebody reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_distill.objectives import MEASURES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


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
    metrics = {
        f"{prefix}_loss": sum(weights[name] * means[name] for name in weights if name in means)
    }
    metrics |= {f"{prefix}_loss/{name}": means[name] for name in weights if name in means}
    for name, key in (("student_nll", "perplexity"), ("teacher_nll", "teacher_perplexity")):
        if name in means:
            metrics[f"{prefix}_{key}"] = math.exp(min(means[name], 700.0))
    metrics |= {f"{prefix}_{name}": means[name] for name in ("kl", "agreement") if name in means}
    return metrics


__all__ = ["MEASURES", "Tally", "evaluation_metrics"]
