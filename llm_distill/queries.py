"""Query rows of attention and relation maps: which positions are sampled, and what each stands for.

Made on the CPU beside the rows, so that every count and every shape is known to the host.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Positions(Protocol):
    """Rows of a batch as far as queries are drawn among them (`llm_distill.rows.Rows`)."""

    @property
    def per_sequence(self) -> tuple[int, ...]:
        """How many rows each sequence has."""

    @property
    def host_position(self) -> Tensor:
        """`[N]` on the CPU, place of each row inside its padded sequence."""


@dataclass(frozen=True)
class Queries:
    """Sampled query positions of attention maps, the same for student and teacher.

    Attributes:
        position: `[B, R]`, places inside the padded sequences, the used ones first; unused places
            repeat a real one.
        used: `[B, R]`, which places count.
        per_sequence: How many places of each sequence count, on the host.
        flat: `[n]`, the places that count, in the flattened `[B * R]`.
        weight: `[B, R]` fp32, how many rows of its sequence a place stands for, 0 where unused: the
            weighted sum over the places is unbiased for the sum over all rows.
        total: All rows they were drawn among.
    """

    position: Tensor
    used: Tensor
    per_sequence: tuple[int, ...]
    flat: Tensor
    weight: Tensor
    total: int

    def __len__(self) -> int:
        """n, the sampled rows, known without asking the device."""
        return sum(self.per_sequence)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Queries:
        """The same queries on a device."""
        position, used, flat, weight = (
            t.to(device, non_blocking=non_blocking)
            for t in (self.position, self.used, self.flat, self.weight)
        )
        return replace(self, position=position, used=used, flat=flat, weight=weight)

    def blocks(self, places: int) -> Iterator[Block]:
        """All places that count, in blocks of at most so many places (one at least).

        Several short sequences share a block; a long one is split. Sequences without a place that
        counts are left out where they stand alone.
        """
        width = self.position.shape[1]
        sequences = max(1, places // width)
        columns = width if places >= width else max(1, places)
        for first in range(0, len(self.per_sequence), sequences):
            counts = self.per_sequence[first : first + sequences]
            most = max(counts)
            # Evenly: a last block of two rows would cost as much as one of ten.
            size = -(-most // max(1, -(-most // columns)))
            for start in range(0, most, max(1, size)):
                yield self._block(first, counts, slice(start, min(start + size, most)))

    def _block(self, first: int, counts: Sequence[int], columns: slice) -> Block:
        """Some columns of some sequences."""
        sequences = slice(first, first + len(counts))
        weight = self.weight[sequences, columns].flatten()
        if min(counts) >= columns.stop:
            return Block(sequences, columns, None, weight)
        used = torch.arange(columns.start, columns.stop) < torch.tensor(counts)[:, None]
        places = used.flatten().nonzero()[:, 0].to(self.flat.device, non_blocking=True)
        return Block(sequences, columns, places, weight.index_select(0, places))


@dataclass(frozen=True)
class Block:
    """Some columns of some sequences of `Queries`.

    Attributes:
        sequences: Of the batch.
        columns: Of the places.
        places: `[n]`, those that count, in the flattened block; None where all do.
        weight: `[n]`, of those that count.
    """

    sequences: slice
    columns: slice
    places: Tensor | None
    weight: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `[B, *, R, *]`; what is the same for all sequences is `[1, *, R, *]`."""
        kept = tensor if len(tensor) == 1 else tensor[self.sequences]
        return kept[:, :, self.columns]

    def rows(self, maps: Tensor) -> Tensor:
        """The rows that count, sequence by sequence: `[b, H, r, T] -> [n, H, T]`."""
        rows = maps.transpose(1, 2).flatten(0, 1)
        return rows if self.places is None else rows.index_select(0, self.places)

    def back(self, rows: Tensor, sequences: int) -> Tensor:
        """The inverse of `rows`, 0 at places that do not count: `[n, H, T] -> [b, H, r, T]`."""
        columns = self.columns.stop - self.columns.start
        if self.places is not None:
            whole = rows.new_zeros(sequences * columns, *rows.shape[1:])
            rows = whole.index_copy_(0, self.places, rows)
        split: Tensor = rows.unflatten(0, (sequences, columns))
        return split.transpose(1, 2)


def sample_queries(
    rows: Positions, keys: Sequence[int], *, most: int | None, seed: int, epoch: int
) -> Queries:
    """Draw query positions of each sequence, from (seed, example, epoch) alone.

    A run sees an example once in each epoch, so each step has a draw of its own; the same example
    has the same queries on every rank, in every batch it may stand in, and after a resumption.

    Args:
        rows: Among these; only their host side is read.
        keys: `example_keys` of the batch.
        most: Queries per sequence at most; None takes all rows.
        seed: Of the run.
        epoch: New queries in each epoch.

    Returns:
        Queries in ascending position. Each of k queries of a sequence with n rows weighs n / k, and
        all rows count: the weighted sum over the count is unbiased for the mean over all rows of
        the batch, however long its sequences are.
    """
    drawn: list[Tensor] = []
    start = 0
    for count, key in zip(rows.per_sequence, keys, strict=True):
        places = rows.host_position[start : start + count]
        if most is not None and count > most:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key} {epoch}".encode()))
            places = places[torch.randperm(count, generator=generator)[:most].sort().values]
        drawn.append(places)
        start += count
    return _queries(drawn, rows.per_sequence)


def _queries(drawn: Sequence[Tensor], rows: Sequence[int]) -> Queries:
    """Ragged positions padded to one width of at least one place."""
    width = max([1, *(len(places) for places in drawn)])
    position = torch.zeros(len(drawn), width, dtype=torch.long)
    weight = torch.zeros(len(drawn), width)
    for row, (places, count) in enumerate(zip(drawn, rows, strict=True)):
        position[row, : len(places)] = places
        position[row, len(places) :] = places[0] if len(places) else 0
        weight[row, : len(places)] = count / max(1, len(places))
    used = weight > 0
    flat = used.flatten().nonzero()[:, 0]
    per_sequence = tuple(len(places) for places in drawn)
    return Queries(position, used, per_sequence, flat, weight, sum(rows))
