"""Log-probabilities of a few tokens in one byte each, and the mass of all others in two.

A row's levels reach from its likeliest token to its least likely one, closer near the first, where
the mass is. The mass outside is stored, not taken from what the levels leave of 1: where a few
tokens hold nearly everything, that would be noise. The likeliest token needs no number of its own,
since the whole sums to 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LEVELS = 255
BEND = 1.5
"""Power of a level. Of 1, 1.5, 2 and 2.5, the least KL over flat and sharp rows together."""

DEPTHS: Floats = ((np.arange(LEVELS + 1) / LEVELS) ** BEND).astype(np.float32)
"""How far below the top each level is, as a share of the span."""

WIDEST = 32.0
"""Nats that levels span at most. A token below has less than 1e-13 of the likeliest one's mass."""

LEAST_HEAD = 6e-8
"""Mass of the kept tokens at least: the smallest step of fp16 at 0."""

THINNEST = 6e4
"""Nats of the thinnest tail that fp16 can say; -1e30 stands for none."""


def to_levels(
    log_probs: NDArray[np.float64], tail: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Levels, their span and the tail: `[N, K], [N] -> [N, K], [N], [N]`.

    Args:
        log_probs: Of the kept tokens, in any order.
        tail: Log of the mass outside.
    """
    below = log_probs.max(1, keepdims=True) - log_probs
    span = np.minimum(below.max(1), WIDEST).astype(np.float16)
    # In units of the span as it is stored, so that its rounding costs nothing.
    depth = (below / np.maximum(span.astype(np.float64), 1e-7)[:, None]).clip(0.0, 1.0)
    levels = np.rint(LEVELS * depth ** (1.0 / BEND)).astype(np.uint8)
    return levels, span, tail.clip(-THINNEST, 0.0).astype(np.float16)


def from_levels(
    levels: NDArray[np.uint8], span: NDArray[np.float16], tail: NDArray[np.float16]
) -> tuple[Floats, Floats]:
    """Log-probabilities that sum to 1 with the tail, and its log: `[N, K], [N] x2 -> [N, K], [N]`.

    >>> levels = to_levels(np.log([[0.4, 0.2, 0.1]]), np.log([0.3]))
    >>> log_probs, tail = from_levels(*levels)
    >>> print(np.exp(log_probs).round(3), np.exp(tail).round(3))
    [[0.4 0.2 0.1]] [0.3]
    """
    found: Floats = np.take(DEPTHS, levels)
    found *= -span.astype(np.float32)[:, None]
    outside = np.minimum(tail.astype(np.float32), np.float32(-LEAST_HEAD))
    inside = np.log(-np.expm1(outside)) - np.log(np.exp(found).sum(1))
    found += inside[:, None]
    return found, outside
