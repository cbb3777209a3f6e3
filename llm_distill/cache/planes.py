"""Token ids as bytes that a compressor likes.

The ids of a row are sorted. Of each, the low byte is kept as it is, which is noise, and the rest as
the step from the id before, which is a small number: 13 bits instead of 17 for 50 ids of 128k, and
still less for real ones, which are no random numbers. Packing the bits would hide that.
"""

from __future__ import annotations

from math import log2

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MOST_TOKENS = 1 << 24
"""Ids that three bytes can tell apart."""


def most_bytes(count: int, vocabulary: int) -> float:
    """Bytes of a row's ids on disk, as many as random ones take: real ones take less.

    Where ids are drawn at random, the steps between them are geometric; the entropy of one, and as
    much as zstd misses it by, is what a step costs. A row has one leap per 65,536 tokens at most.

    >>> [round(most_bytes(50, size)) for size in (256, 32_000, 128_256)]
    [57, 75, 88]
    """
    gap = vocabulary / 256 / count
    bits = (gap + 1) * log2(gap + 1) - gap * log2(gap)
    step = min(1.0, (bits + 0.7) / 8)
    return count * (1.03 + step) + min(0.4 * count, vocabulary / 65_536)


def split_ids(ids: NDArray[np.int64]) -> dict[str, Bytes]:
    """Sorted ids as three planes of bytes: `[N, K] -> {low, step, leap} of [N, K]`.

    >>> {name: plane.tolist() for name, plane in split_ids(np.array([[3, 258, 70000]])).items()}
    {'low': [[3, 2, 112]], 'step': [[0, 1, 16]], 'leap': [[0, 0, 1]]}
    """
    high = ids >> 8
    steps = np.diff(high, axis=1, prepend=0)
    planes = {"low": ids & 255, "step": steps & 255, "leap": steps >> 8}
    return {name: plane.astype(np.uint8) for name, plane in planes.items()}


def join_ids(low: Bytes, step: Bytes, leap: Bytes) -> NDArray[np.int64]:
    """What `split_ids` took apart: three `[N, K] -> [N, K]`.

    >>> join_ids(**split_ids(np.array([[3, 258, 70000]]))).tolist()
    [[3, 258, 70000]]
    """
    steps = step.astype(np.int32)
    far = np.flatnonzero(leap)  # hardly any: a look at the bytes costs less than adding zeros
    if len(far):
        steps.reshape(-1)[far] += leap.reshape(-1)[far].astype(np.int32) << 8
    ids: NDArray[np.int64] = torch.from_numpy(steps).cumsum(1).numpy()  # three times numpy's speed
    ids <<= 8
    ids |= low
    return ids
