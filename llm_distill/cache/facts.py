"""What a cache tells of each token besides its targets, for whoever weighs or filters data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_distill.cache.shards import ShardReader
from llm_distill.cache.store import Store
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Floats = NDArray[np.float32]

COLUMN = "facts"


@dataclass(frozen=True, eq=False)
class Facts:
    """What the teacher thought of the supervised tokens of one example, in their order.

    Attributes:
        key: Of the example.
        label_log_probs: Log-probability of each, nats: `[N]`.
        entropy: Of the teacher's distribution before each, nats: `[N]`.
    """

    key: bytes
    label_log_probs: Floats
    entropy: Floats


def read_facts(path: str | Path, split: str = "train") -> Iterator[Facts]:
    """The label's log-probability and the entropy of each supervised token of a cache.

    Kept in two bytes each: eleven bits of precision.

    Args:
        path: Of a finished cache.
        split: `train`, `eval`, or `eval[name]`.

    Returns:
        One for each example, in the order of the data: those that stand twice once, those without
        a supervised token not at all.

    Raises:
        InputError: If there is no such cache or split, or it keeps hidden states alone.
    """
    store = Store.open(Path(path).expanduser(), (COLUMN,))
    kept, there = store.manifest.estimator, store.manifest.shards
    if COLUMN not in kept.columns:
        raise InputError(
            f"the cache {path} keeps {kept}, and the facts of tokens are kept beside topk, sampled "
            "and hybrid alone; ask the states' own head, or write a cache with keep: topk"
        )
    files = [store.folder / shard.file for shard in there if shard.split == split]
    if not files:
        known = ", ".join(dict.fromkeys(shard.split for shard in there))
        raise InputError(f"the cache {path} holds no {split} data; write one of {known}")
    return _read(files)


def _read(files: list[Path]) -> Iterator[Facts]:
    """The facts of shards."""
    for file in files:
        reader = ShardReader.open(file, (COLUMN,))
        for number in range(reader.file.num_row_groups):
            group = reader.read(number)
            for key, example in zip(group.keys, group.examples, strict=True):
                labels, entropy = example.halves(COLUMN, 2).astype(np.float32)
                yield Facts(key, labels, entropy)
