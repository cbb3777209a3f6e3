"""From what a server tells of each row to a target: exactly k tokens and the mass of the rest."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from llm_distill.losses.softmax import FLOOR
from llm_distill.losses.sparse import TopK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

FORBIDDEN = -9999.0
"""What vLLM writes for a log-probability of -inf, which JSON does not have."""

SLACK = 1e-3
"""What probabilities may sum to above 1: log-probabilities come rounded, from bf16 at worst."""

RESOLUTION = 1e-7
"""Of a sum of fp32 probabilities: a tail of less is noise."""


UNNORMALISED = (
    "the server gives raw or otherwise unnormalised values; start vLLM with --logprobs-mode "
    "raw_logprobs"
)
"""What such probabilities come from, and what to do."""


def top_k(
    rows: Sequence[Mapping[int, float]], k: int, vocabulary: int, common: int | None = None
) -> TopK:
    """The k likeliest tokens of each row, in descending order, and the tail.

    Servers may tell k + 1: the token that really came next is told as well.

    Args:
        rows: Log-probability by token.
        k: Tokens to keep; fewer stay where some are put aside.
        vocabulary: Tokens of the model.
        common: The first so many are those that the student has too; others are put aside.

    Raises:
        ValueError: If there are fewer than k of a row, tokens that the model does not have,
            log-probabilities that are none, or nothing that the student has.

    >>> top = top_k([{5: -0.5, 7: -1.5, 2: -4.0}], 2, 10)
    >>> top.ids, top.log_probs
    (tensor([[5, 7]]), tensor([[-0.5000, -1.5000]]))
    """
    counts = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    if len(rows) and counts.min() < k:
        raise ValueError(f"{counts.min()} tokens of a row, and {k} were asked for")
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    values = np.fromiter(chain.from_iterable(row.values() for row in rows), np.float64)
    _check(ids, values, vocabulary)
    order = np.lexsort((-values, np.repeat(np.arange(len(rows)), counts)))
    starts = np.cumsum(counts) - counts
    places = order[starts[:, None] + np.arange(k)]
    kept = np.maximum(values[places], FORBIDDEN)
    told, tail = ids[places], log_tail(kept, vocabulary)
    if common is not None and common < vocabulary and len(rows):
        told, kept, tail = _cut(told, kept, tail, common)
    return TopK(
        torch.from_numpy(told),
        torch.from_numpy(kept.astype(np.float32)),
        torch.from_numpy(tail.astype(np.float32)),
    )


def log_tail(kept: NDArray[np.float64], vocabulary: int) -> NDArray[np.float64]:
    """Log of the mass outside the kept tokens: `[N, K] -> [N]`.

    It is 1 minus their sum, of which rounding leaves nothing where the tail is thin. No token of
    the tail is likelier than the least of the kept ones, which bounds it from above.

    Args:
        kept: Log-probabilities, the least of each row last.
        vocabulary: Tokens of the model; as many as are kept leave no tail, log-probability -1e30.

    Raises:
        ValueError: If a row sums to more than 1, or to less whatever the other tokens have.

    >>> log_tail(np.log([[0.5, 0.25]]), 4).round(4)
    array([-1.3863])
    """
    outside = vocabulary - kept.shape[1]
    total = np.exp(kept).sum(1)
    if len(total) and total.max() > 1 + SLACK:
        raise ValueError(
            f"probabilities of a row sum to {total.max():.4g}, which is more than 1: {UNNORMALISED}"
        )
    most = total + max(outside, 0) * np.exp(kept[:, -1])
    if len(most) and most.min() < 1 - SLACK:
        raise ValueError(
            f"probabilities of a row sum to {most.min():.4g} at most, which is less than 1: "
            f"{UNNORMALISED}"
        )
    if outside <= 0:
        return np.full(len(kept), FLOOR)
    rest = np.log(np.maximum(1.0 - total, RESOLUTION))
    bounded: NDArray[np.float64] = np.minimum(rest, kept[:, -1] + np.log(outside))
    return bounded


def _cut(
    ids: NDArray[np.int64], kept: NDArray[np.float64], tail: NDArray[np.float64], common: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Tokens beyond the common ones put aside, and the rest normalised: `[N, K] x2, [N]`.

    All rows keep as many as the one that keeps fewest; what others had more is in their tails. So
    is what was not told of tokens beyond: no server says it, and models give padding next to none.

    Raises:
        ValueError: If nothing of a row is left.
    """
    inside = ids < common
    counts = inside.sum(1)
    width = counts.min()
    if width == 0:
        raise ValueError(
            f"of a row it tells only of tokens from {common} on, which the student does not have"
        )
    bound = kept[:, -1] + np.log(np.maximum(common - counts, 1))
    tail = np.where(counts < common, np.minimum(tail, bound), FLOOR)
    order = np.argsort(~inside, axis=1, kind="stable")  # what stays first, the likeliest before
    ids, kept = np.take_along_axis(ids, order, 1), np.take_along_axis(kept, order, 1)
    kept = np.where(np.take_along_axis(inside, order, 1), kept, FLOOR)
    tail = np.logaddexp.reduce(np.column_stack([kept[:, width:], tail]), axis=1)
    ids, kept = ids[:, :width], kept[:, :width]
    mass = np.logaddexp.reduce(np.column_stack([kept, tail]), axis=1)
    return ids, kept - mass[:, None], np.maximum(tail - mass, FLOOR)


def _check(ids: NDArray[np.int64], values: NDArray[np.float64], vocabulary: int) -> None:
    """Refuse what is no token, or no log-probability.

    Raises:
        ValueError: Naming it.
    """
    if not ids.size:
        return
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        raise ValueError(f"token {outside[0]}, and the model has {vocabulary}")
    wrong = values[~(values <= SLACK)]  # NaN is neither
    if wrong.size:
        raise ValueError(f"a log-probability of {wrong[0]:.4g}: {UNNORMALISED}")
