"""Where each example is: keys in order, mapped from a file, so that it takes no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Numbers = NDArray[np.uint64]

FILE = "index.npy"

OF_EXAMPLE = 24
"""Bytes of an example: two halves of a key, and a place."""


@dataclass(frozen=True)
class Place:
    """Where an example is: shard, row group of it, row of that."""

    shard: int
    group: int
    row: int


@dataclass(frozen=True)
class Index:
    """Keys and places.

    Attributes:
        table: `[3, M]`: the two halves of each key, ascending, and its place in one number: 24 bits
            of the shard, 24 of the group, 16 of the row.
    """

    table: Numbers

    @classmethod
    def of(cls, keys: Sequence[bytes], places: Sequence[Place]) -> Index:
        """From examples in any order."""
        halves = _halves(keys)
        packed = [p.shard << 40 | p.group << 16 | p.row for p in places]
        table = np.concatenate([halves, np.array(packed, np.uint64)[None]])
        return cls(np.ascontiguousarray(table[:, np.lexsort((table[1], table[0]))]))

    @classmethod
    def read(cls, folder: Path) -> Index:
        """From a file, which stays there.

        Raises:
            InputError: If it is none.
        """
        try:
            table = np.load(folder / FILE, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{folder / FILE} cannot be read ({error}); copy it anew") from error
        return cls(table)

    def write(self, folder: Path) -> None:
        """Into a file."""
        np.save(folder / FILE, self.table, allow_pickle=False)

    def __len__(self) -> int:
        """Examples."""
        return int(self.table.shape[1])

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Where examples are; None for those that are not there."""
        if not keys:
            return []
        columns = self._columns(keys)
        packed = self.table[2, columns.clip(0)] if len(self) else columns
        return [
            Place(place >> 40, place >> 16 & 0xFFFFFF, place & 0xFFFF) if column >= 0 else None
            for column, place in zip(columns.tolist(), packed.tolist(), strict=True)
        ]

    def holds(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which examples are there: `[M]`."""
        return self._columns(keys) >= 0

    def _columns(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Columns of the table, -1 for what is not in it: `[M]`."""
        first, second = _halves(keys)
        if not len(self):
            return np.full(len(keys), -1)
        column = np.searchsorted(self.table[0], first)
        while True:  # once, unless two keys share their first half
            here = column.clip(0, len(self) - 1)
            there = self.table[:2, here]
            inside = (column < len(self)) & (there[0] == first)
            further = inside & (there[1] < second)
            if not further.any():
                return np.where(inside & (there[1] == second), column, -1)
            column = column + further


def _halves(keys: Sequence[bytes]) -> Numbers:
    """Keys as two numbers each: `[2, M]`."""
    return np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).T.astype(np.uint64)
