"""A balance that looks at the gradients of the terms at one layer of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping  # noqa: TC003  recipes read the hints
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_distill.balance.base import Balance, RunningMean
from llm_distill.objectives import Term  # noqa: TC001  recipes read the hints

if TYPE_CHECKING:
    from llm_distill.signals import Request

TINY = 1e-20
"""Stands in for a gradient of 0."""


def gradient(
    terms: Mapping[str, Term],
    depth: int,
    *,
    layer: int | None = None,
    every: int = 20,
    momentum: float = 0.5,
    most: float = 1e4,
) -> Balance:
    """Let the gradients of the terms at one layer of the student compare as their weights do.

    Before every `every`-th step its batches are run once more and the norm of each term's own
    gradient at the hidden state is taken, for the mean over the whole step; G is its running mean.
    The factor is `c / G_k` with `c = sum w G / sum w`: weighted norms are as the weights, and their
    sum is what it was.

    Departures: GradNorm's fixed point for equal training rates (alpha = 0), solved rather than
    followed by gradient steps; at hidden states, where no second backward through the parameters is
    needed, rather than at shared weights.

    Args:
        terms: None may read below the layer, where its gradient would not be seen.
        depth: Of the student.
        layer: Hidden state of the student; by default the lowest that a term reads (block b reads
            hidden state b - 1), or the last one.
        every: Steps from one measurement to the next.
        momentum: Of the running mean over measurements, a fraction below 1.
        most: No factor is larger.

    Raises:
        ValueError: For numbers outside these ranges, or a term that reads below the layer.

    Source: Chen et al. 2018 (GradNorm), arXiv 1711.02257, equations 1 and 2.
    """
    reads = {name: lowest_state(term.student, depth) for name, term in terms.items()}
    chosen = min(reads.values()) if layer is None else layer
    if not 0 <= chosen <= depth:
        raise ValueError(f"gradient: layer={layer}; the student has hidden states 0..{depth}")
    below = {name: lowest for name, lowest in reads.items() if lowest < chosen}
    for name, lowest in below.items():
        raise ValueError(
            f"gradient: {name} reads the student from hidden state {lowest} on, and its gradient "
            f"would not be seen at layer={chosen}; write layer: {min(below.values())} or leave it "
            "out"
        )
    if every < 1:
        raise ValueError(f"gradient: every={every}; write a number of steps >= 1 (20)")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"gradient: momentum={momentum}; write 0 <= momentum < 1 (0.5)")
    if not (math.isfinite(most) and most >= 1.0):
        raise ValueError(f"gradient: most={most}; write a finite number >= 1 (1e4)")
    return Gradient(len(terms), chosen, every, momentum, most)


def lowest_state(request: Request, depth: int) -> int:
    """The lowest hidden state that a request reads; block b works on hidden state b - 1.

    >>> from llm_distill.signals import Request
    >>> lowest_state(Request(hidden=frozenset({2}), heads=frozenset({2})), depth=4)
    1
    """
    return min([depth, *request.hidden, *(block - 1 for block in request.heads)])


class Gradient(Balance):
    """Bound `gradient`.

    Attributes:
        norms: Running mean of the norm of each term's gradient.
    """

    moves = True

    def __init__(self, count: int, layer: int, every: int, momentum: float, most: float) -> None:
        super().__init__()
        self.layer = layer
        self.every, self.most = every, most
        self.norms = RunningMean(count, momentum)

    def asks(self, done: int) -> bool:
        """Before every `every`-th step, the first included."""
        return done % self.every == 0

    @torch.no_grad()
    def measured(self, values: Tensor, squares: Tensor) -> None:
        """One more measurement."""
        del values
        self.norms.add(squares.sqrt())

    def factors(self, weights: Tensor) -> Tensor:
        """The weighted mean norm over each norm; 0 where nothing is known."""
        norms = self.norms.mean.clamp_min(TINY)
        known = norms.isfinite()
        weights, norms = torch.where(known, weights, 0.0), torch.where(known, norms, TINY)
        common = (weights * norms).sum() / weights.sum().clamp_min(TINY)
        factors = common / torch.maximum(norms, common / self.most)
        return torch.where(known & (common > 0), factors, 0.0)

    def describe(self) -> str:
        """For tables."""
        return (
            f"gradient: norms at hidden state {self.layer} of the student as the weights, measured "
            f"every {self.every} steps"
        )
