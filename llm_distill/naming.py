"""Every example of a dataset by name, as a cache knows it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from rich.progress import track

from llm_distill.data import Collator
from llm_distill.keys import example_key
from llm_distill.rows import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_distill.collation import RowCollator

PIECE = 1000
"""Examples that are read from a table at a time."""

MANY = 20_000
"""Examples from which naming them shows a bar."""


@dataclasses.dataclass(frozen=True)
class Named:
    """The examples of one split.

    Attributes:
        keys: In their order.
        rows: Supervised rows of each.
        lengths: Tokens of each.
    """

    keys: Sequence[bytes]
    rows: Sequence[int]
    lengths: Sequence[int]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {
            "examples": len(self.keys),
            "rows": sum(self.rows),
            "longest": max(self.lengths, default=0),
        }


def names_of(dataset: Any, collator: RowCollator, read: Callable[[Any], Any]) -> Named:  # noqa: ANN401  what Trainer takes
    """All examples of a dataset by name; from its columns where nothing else decides."""
    plain = isinstance(dataset, Dataset) and set(dataset.column_names) <= {"input_ids", "labels"}
    if plain and isinstance(collator.collator, Collator):
        found = _from_columns(dataset, shift=collator.shift)
    else:
        found = _from_batches(dataset, collator, read)
    shown = len(dataset) >= MANY and os.environ.get("RANK", "0") == "0"
    bar = track(found, "looking at the data", total=len(dataset), transient=True, disable=not shown)
    keys, rows, lengths = [], [], []
    for key, count, length in bar:
        keys.append(key)
        rows.append(count)
        lengths.append(length)
    return Named(keys, rows, lengths)


def _from_columns(dataset: Dataset, *, shift: bool) -> Iterator[tuple[bytes, int, int]]:
    """Key, supervised rows and tokens of each example, some microseconds for one."""
    table = dataset.with_format("arrow")
    labelled = "labels" in dataset.column_names
    for start in range(0, len(dataset), PIECE):
        part = table[start : start + PIECE]
        ids = part["input_ids"].combine_chunks()
        tokens = ids.flatten().to_numpy()
        labels = part["labels"].combine_chunks().flatten().to_numpy() if labelled else tokens
        end = 0
        for length in ids.value_lengths().to_pylist():
            begin, end = end, end + length
            marked = np.flatnonzero(labels[begin + shift : end] != IGNORED)
            yield example_key(tokens[begin:end], marked), len(marked), length


def _from_batches(
    dataset: Any,  # noqa: ANN401  what Trainer takes
    collator: RowCollator,
    read: Callable[[Any], Any],
) -> Iterator[tuple[bytes, int, int]]:
    """The same by collating each example alone, which any dataset and collator can."""
    naming = dataclasses.replace(collator, named=True, lookup=None)
    for place in range(len(dataset)):
        with torch.random.fork_rng(devices=[]):
            batch = naming([read(dataset[place])])
        found = batch["examples"]
        mask = batch.get("attention_mask")
        length = batch["input_ids"].shape[1] if mask is None else int((mask != 0).sum())
        yield found.keys[0], found.rows[0], length
