"""A race between layer maps: short trainings on the same data, judged by held-out KL."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_distill.layers import LayerMap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KEPT = 2
"""Candidates that go on to the next round, no hint not among them."""

LONGER = 2
"""Times as long is a training in each round than in the one before."""


@dataclass(frozen=True)
class Arm:
    """One candidate.

    Attributes:
        name: For the table.
        mapping: Which layers; None: no hint at all.
        weight: Times the weight that the objective has.
        blockwise: Share of the training in which every block learns alone.
    """

    name: str
    mapping: LayerMap | None
    weight: float = 1.0
    blockwise: float = 0.0

    def describe(self) -> str:
        """Name, weight and start.

        >>> Arm("none", None).describe()
        'none'
        """
        if self.mapping is None:
            return self.name
        start = f", blockwise {self.blockwise:.0%}" if self.blockwise else ""
        return f"{self.name} x {self.weight:g}{start}"


@dataclass(frozen=True)
class Result:
    """What an arm came to.

    Attributes:
        arm: The candidate.
        steps: How long it was trained.
        kl: KL(teacher || student) on held-out text after it, nats per token; NaN for a training
            that failed.
    """

    arm: Arm
    steps: int
    kl: float


@dataclass(frozen=True)
class Size:
    """How many take part.

    Attributes:
        hints: Candidates with a map.
        weights: That the best maps are tried with.
        none: Whether no hint at all takes part.
        shortest: Steps of a training of the first round, below which a race says nothing.
    """

    hints: int
    weights: int
    none: bool = True
    shortest: int = 15

    @property
    def trainings(self) -> tuple[int, int, int]:
        """Of each round, at most.

        >>> Size(5, 3).trainings, Size(1, 1, none=False).trainings
        ((6, 7, 3), (1, 1, 1))
        """
        second = min(self.hints, KEPT) * self.weights
        return self.hints + self.none, second + self.none, min(second, KEPT) + self.none

    @property
    def least(self) -> int:
        """Steps of the shortest race.

        >>> Size(5, 3).least
        480
        """
        return self.shortest * self._shares

    def lengths(self, budget: int) -> tuple[int, int, int]:
        """Steps of one training in each round, as long as the budget allows.

        Args:
            budget: Steps of all trainings together, >= `least`.

        >>> Size(5, 3).lengths(800)
        (25, 50, 100)
        """
        shortest = budget // self._shares
        return shortest, LONGER * shortest, LONGER**2 * shortest

    @property
    def _shares(self) -> int:
        """Steps of all trainings, in units of the shortest."""
        return sum(count * LONGER**place for place, count in enumerate(self.trainings))


def race(
    arms: Sequence[Arm],
    weights: Sequence[float],
    budget: int,
    measure: Callable[[Arm, int], float],
) -> tuple[Arm, tuple[Result, ...]]:
    """Successive halving: all maps, then the two best with all weights, then the two best of those.

    No hint at all is in every round, if it is among the arms: it wins unless a hint is better.
    Trainings that failed do not go on.

    Args:
        arms: At the middle weight; the first of equals is the better one.
        weights: Factors on the hint's weight.
        budget: Steps of all trainings together.
        measure: (arm, steps) -> held-out KL after a training of that length; not finite for one
            that failed.

    Returns:
        The winner, and what every training came to.

    Raises:
        FloatingPointError: If all trainings of the last round failed.

    Source: Jamieson and Talwalkar 2015, arXiv 1502.07943, algorithm 1.
    """
    none = [arm for arm in arms if arm.mapping is None]
    hints = [arm for arm in arms if arm.mapping is not None]
    short, middle, long = Size(len(hints), len(weights), none=bool(none)).lengths(budget)
    results: list[Result] = []

    def run(candidates: Sequence[Arm], steps: int) -> list[Arm]:
        """Those that did not fail, the best first."""
        found = [Result(arm, steps, measure(arm, steps)) for arm in (*none, *candidates)]
        results.extend(found)
        return [r.arm for r in sorted(found, key=_kl) if math.isfinite(r.kl)]

    best = _hints(run(hints, short))
    second = [replace(arm, weight=weight) for arm in best for weight in weights]
    best = _hints(run(second, middle))
    last = run(best, long)
    if not last:
        raise FloatingPointError(
            "auto_race: no training of the race came to a finite KL; try a smaller learning_rate, "
            "or max_grad_norm"
        )
    return last[0], tuple(results)


def _hints(ordered: Sequence[Arm]) -> list[Arm]:
    """The best that go on."""
    return [arm for arm in ordered if arm.mapping is not None][:KEPT]


def _kl(result: Result) -> float:
    """To sort by; a training that failed is last."""
    return result.kl if math.isfinite(result.kl) else math.inf


def table(results: Sequence[Result], winner: Arm) -> list[str]:
    """What every training came to, the longest first, and what that means."""
    ordered = sorted(results, key=lambda r: (-r.steps, _kl(r)))
    longest = [result for result in ordered if result.steps == ordered[0].steps]
    lines = ["race: steps | held-out KL | candidate"]
    for result in ordered:
        taken = result.arm == winner and result.steps == longest[0].steps
        mark = " <- taken" if taken else ""
        lines.append(f"{result.steps:>11} | {result.kl:>11.4f} | {result.arm.describe()}{mark}")
    return [*lines, *_meaning(longest, winner)]


def _meaning(longest: Sequence[Result], winner: Arm) -> list[str]:
    """What a race says of hints at all, where no hint took part in its last round."""
    bare = [result.kl for result in longest if result.arm.mapping is None]
    hinted = [_kl(result) for result in longest if result.arm.mapping is not None]
    if not bare:
        return []
    best = min(hinted, default=math.inf)
    if winner.mapping is None:
        told = f"KL {best:.4f} with the best" if math.isfinite(best) else "all with one failed"
        return [f"race: no hint is taken: KL {bare[0]:.4f} without, {told}"]
    return [f"race: the hint is worth {bare[0]:.4f} - {best:.4f} = {bare[0] - best:.4f} of KL"]
