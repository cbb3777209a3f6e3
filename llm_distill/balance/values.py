"""Balances that look at the values of the terms: over their running means, or by uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping  # noqa: TC003  recipes read the hints

import torch
from torch import Tensor

from llm_distill.balance.base import Balance, RunningMean
from llm_distill.objectives import Term  # noqa: TC001  recipes read the hints


def normalised(
    terms: Mapping[str, Term], depth: int, *, momentum: float = 0.99, floor: float = 1e-3
) -> Balance:
    """Divide each term by the running mean of its own value, so that weights compare.

    The mean is over steps, bias corrected, and does not see the step it is used in; the first step
    is measured before it is taken. A term whose first items come later counts from the step after.

    Args:
        terms: Their number counts.
        depth: Not used.
        momentum: Of the running mean, a fraction below 1.
        floor: Means below count as this, in units of the term: what is almost solved must not drown
            the rest in its noise. A student that starts as its teacher has means of 0, and only
            this holds their weights: write a larger one there (0.1).

    Raises:
        ValueError: For numbers outside these ranges.
    """
    del depth
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"normalised: momentum={momentum}; write 0 <= momentum < 1 (0.99)")
    if not (math.isfinite(floor) and floor > 0.0):
        raise ValueError(f"normalised: floor={floor}; write a finite number > 0 (1e-3)")
    return Normalised(len(terms), momentum, floor)


def uncertainty(
    terms: Mapping[str, Term], depth: int, *, learning_rate: float = 0.01, lowest: float = -5.0
) -> Balance:
    """Weigh each term by its learned uncertainty: minimise `sum_k w_k (e^-s_k L_k + s_k)`.

    After every step `s <- max(lowest, s - learning_rate (1 - e^-s L))`, with L the mean over the
    whole step; s starts at 0 and is at rest where `s = log L`. The logged loss is without `s_k`.

    Departures: s is bounded below, since L -> 0 would let it fall for ever, and its gradient counts
    within [-1, 1], so that a term of 1000 does not throw it.

    Args:
        terms: Their number counts.
        depth: Not used.
        learning_rate: Of s, per step.
        lowest: Bound of s; no weight grows by more than `e^-lowest`.

    Raises:
        ValueError: For numbers outside these ranges.

    Source: Kendall et al. 2018 (uncertainty weighting), arXiv 1705.07115, equation 10.
    """
    del depth
    if not (math.isfinite(learning_rate) and learning_rate > 0.0):
        raise ValueError(
            f"uncertainty: learning_rate={learning_rate}; write a finite number > 0 (0.01)"
        )
    if not (math.isfinite(lowest) and lowest <= 0.0):
        raise ValueError(f"uncertainty: lowest={lowest}; write a finite number <= 0 (-5)")
    return Uncertainty(len(terms), learning_rate, lowest)


class Normalised(Balance):
    """Bound `normalised`.

    Attributes:
        running: Mean value of each term.
        first: `[K]`, what was measured before the first step; NaN before that.
    """

    moves = hears = True

    def __init__(self, count: int, momentum: float, floor: float) -> None:
        super().__init__()
        self.first: Tensor
        self.floor = floor
        self.running = RunningMean(count, momentum)
        self.register_buffer("first", torch.full((count,), math.nan))

    def asks(self, done: int) -> bool:
        """Before the first step."""
        return done == 0

    @torch.no_grad()
    def measured(self, values: Tensor, squares: Tensor) -> None:
        """Keep the values for the first step."""
        del squares
        self.first.copy_(values)

    @torch.no_grad()
    def after_step(self, values: Tensor) -> None:
        """One more step."""
        self.running.add(values)

    def factors(self, weights: Tensor) -> Tensor:
        """One over the mean; 0 where nothing is known."""
        del weights
        mean = self.running.mean
        mean = torch.where(mean.isfinite(), mean, self.first)
        return torch.where(mean.isfinite(), 1.0 / mean.clamp_min(self.floor), 0.0)

    def describe(self) -> str:
        """For tables."""
        return f"normalised: each term over its running mean, momentum {self.running.momentum:g}"


class Uncertainty(Balance):
    """Bound `uncertainty`.

    Attributes:
        s: `[K]`, logarithms.
    """

    moves = hears = True

    def __init__(self, count: int, learning_rate: float, lowest: float) -> None:
        super().__init__()
        self.s: Tensor
        self.learning_rate, self.lowest = learning_rate, lowest
        self.register_buffer("s", torch.zeros(count))

    @torch.no_grad()
    def after_step(self, values: Tensor) -> None:
        """One step downhill."""
        slope = (1.0 - torch.exp(-self.s) * values.to(self.s.dtype)).clamp(-1.0, 1.0)
        moved = (self.s - self.learning_rate * slope).clamp_min(self.lowest)
        self.s.copy_(torch.where(values.isfinite(), moved, self.s))

    def factors(self, weights: Tensor) -> Tensor:
        """`e^-s`."""
        del weights
        return torch.exp(-self.s)

    def describe(self) -> str:
        """For tables."""
        return f"uncertainty: s learned at {self.learning_rate:g}, not below {self.lowest:g}"
