"""Paired differences with their uncertainty, and rank correlation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DRAWS = 4000
"""Of the bootstrap."""

MARGIN = 0.5
"""Percent of held-out KL by which a map may be worse and still be as good."""


@dataclass(frozen=True)
class Difference:
    """How much larger one arm's KL is than another's, in percent of the other's.

    Attributes:
        mean: Over the seeds and documents that both have.
        low: 2.5 % of the bootstrap are below.
        high: 2.5 % are above.
        seeds: That both have.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def as_good(self) -> bool:
        """Not worse by the margin or more, at 95 %."""
        return self.high < MARGIN

    @property
    def better(self) -> bool:
        """Better, at 95 %."""
        return self.high < 0

    def __str__(self) -> str:
        """For tables.

        >>> str(Difference(-1.25, -2.0, -0.5, 8))
        '-1.25 [-2.00, -0.50]'
        """
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def difference(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], *, draws: int = DRAWS
) -> Difference:
    """Paired difference of means: `[S][D], [S][D]`, the same seeds and documents in both.

    The bootstrap draws seeds, and documents anew, both with replacement, for both arms at once.
    Identical arms differ by 0 in every draw.

    Raises:
        ValueError: If the shapes differ, or there is nothing.

    >>> difference([[1.0, 2.0]], [[2.0, 4.0]]).mean
    -50.0
    """
    ours, theirs = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if ours.shape != theirs.shape or ours.ndim != 2 or not ours.size:
        raise ValueError(
            f"shapes {ours.shape} and {theirs.shape} are no pairs of seeds x documents"
        )
    draw = np.random.default_rng(0)
    seeds, documents = ours.shape
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_documents = draw.multinomial(documents, np.full(documents, 1 / documents), draws) / documents

    def drawn(values: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.einsum("ks,sd,kd->k", of_seeds, values, of_documents)
        return found

    ratios = 100 * (drawn(ours) / drawn(theirs) - 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    mean = 100 * (float(ours.mean()) / float(theirs.mean()) - 1)
    return Difference(mean, float(low), float(high), seeds)


def interval(values: Sequence[Sequence[float]], *, draws: int = DRAWS) -> tuple[float, float]:
    """95 % interval of a mean over seeds, documents as they are: `[S][D]`."""
    means = np.asarray(values, dtype=float).mean(1)
    draw = np.random.default_rng(0)
    picked = draw.integers(len(means), size=(draws, len(means)))
    low, high = np.quantile(means[picked].mean(1), [0.025, 0.975])
    return float(low), float(high)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant.

    >>> round(spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]), 6)
    0.8
    """
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return float(stats.spearmanr(one, other).statistic)


def verdict(name: str, found: Difference | None, best: str | None) -> str:
    """One sentence on an arm against the best map by hand."""
    if found is None or best is None:
        return f"{name}: not finished."
    if found.better:
        word = "better than"
    elif found.as_good:
        word = "as good as"
    elif found.low > MARGIN:
        word = "**worse** than"
    else:
        word = "**not shown** to be as good as"
    return f"{name} is {word} the best map by hand ({best}): {found} % over {found.seeds} seeds."


def goal(found: Sequence[Difference | None]) -> str:
    """The issue's goal over all pairs: as good on each, better on at least one."""
    if any(one is None for one in found) or not found:
        return "not decided: some pairs are not finished"
    known = [one for one in found if one is not None]
    if all(one.as_good for one in known) and any(one.better for one in known):
        return "reached"
    worse = sum(not one.as_good for one in known)
    if worse:
        return f"**not reached**: not shown to be as good on {worse} of {len(known)} pairs"
    return "**not reached**: as good on every pair, better on none"
