"""Examples by name: 128 bits of their tokens and of what is supervised in them.

The same example has the same key in any batch, order, rank or pack, with padding on any side, so
that what was written down of it can be found again.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_BYTES = 16
"""Of a key. Among 10^9 examples, two different ones share one with a chance of 10^-21."""


@dataclass(frozen=True)
class Examples:
    """The examples of a batch, in the order of its rows.

    Attributes:
        keys: One for each.
        rows: Supervised rows of each.
        per_sequence: Examples in each sequence of the batch: 1 where nothing is packed.
        lengths: Real tokens of each.
    """

    keys: tuple[bytes, ...]
    rows: tuple[int, ...]
    per_sequence: tuple[int, ...]
    lengths: tuple[int, ...]

    def first(self, sequences: int) -> Examples:
        """Those of the first sequences only."""
        kept = sum(self.per_sequence[:sequences])
        few = self.per_sequence[:sequences]
        return Examples(self.keys[:kept], self.rows[:kept], few, self.lengths[:kept])

    def only(self, sequences: Sequence[int]) -> Examples:
        """Those of some sequences; of those that were left out before, none."""
        sequences = [s for s in sequences if s < len(self.per_sequence)]
        ends = [0, *accumulate(self.per_sequence)]
        kept = [k for s in sequences for k in range(ends[s], ends[s + 1])]
        return Examples(
            tuple(self.keys[k] for k in kept),
            tuple(self.rows[k] for k in kept),
            tuple(self.per_sequence[s] for s in sequences),
            tuple(self.lengths[k] for k in kept),
        )


def example_key(tokens: np.ndarray, supervised: np.ndarray) -> bytes:
    """The key of one example: `[T], [N] -> 16 bytes`.

    Args:
        tokens: Its real tokens.
        supervised: Places in them that predict something, ascending.

    >>> example_key(np.array([5, 6, 7]), np.array([0, 1])).hex()
    '4a5ded9c6b88aef18fc034e10f41e1c9'
    """
    digest = blake2b(len(tokens).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(supervised, dtype="<i4").tobytes())
    return digest.digest()


def begins(real: np.ndarray, position_ids: Tensor | None) -> list[list[int]]:
    """Where examples begin among the real tokens of each sequence: `[B, T] x2`.

    >>> begins(np.ones((1, 5), bool), torch.tensor([[0, 1, 2, 0, 1]]))
    [[0, 3]]
    """
    if position_ids is None:
        return [[0] for _ in real]
    places = position_ids.expand(torch.Size(real.shape)).numpy()
    starts = (np.flatnonzero(own[keep][1:] == 0) for own, keep in zip(places, real, strict=True))
    return [[0, *(found + 1).tolist()] for found in starts]


def name_examples(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    rows: tuple[Tensor, Tensor],
) -> Examples:
    """The examples of a batch: `[B, T] x3 -> Examples`.

    Args:
        input_ids: Tokens.
        attention_mask: 1 at real tokens; None: all are real.
        position_ids: Where they begin anew inside a sequence, another example begins.
        rows: Sequence and position of each supervised row, `[N]` each.
    """
    ids = input_ids.numpy()
    real = np.ones(ids.shape, bool) if attention_mask is None else attention_mask.numpy() != 0
    supervised = np.zeros(ids.shape, bool)
    supervised[rows[0].numpy(), rows[1].numpy()] = True
    keys, counts, lengths, per_sequence = [], [], [], []
    for k, starts in enumerate(begins(real, position_ids)):
        tokens, marks = ids[k, real[k]], supervised[k, real[k]]
        for start, end in pairwise([*starts, len(tokens)]):
            marked = np.flatnonzero(marks[start:end])
            keys.append(example_key(tokens[start:end], marked))
            counts.append(len(marked))
            lengths.append(end - start)
        per_sequence.append(len(starts))
    return Examples(tuple(keys), tuple(counts), tuple(per_sequence), tuple(lengths))
