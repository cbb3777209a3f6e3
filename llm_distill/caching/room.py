"""Whether a disk can hold a cache, before the teacher is asked."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from llm_distill.cache import index
from llm_distill.cache.manifest import UNFINISHED
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_distill.caching.plan import Capture

SPARE = 1.05
"""Room that is asked for, times what the shards take at most."""

OF_NOTE = 1024
"""Bytes of what is noted of a shard, in a file of its own and in the manifest; more with layers."""

OF_TOKEN = 256
"""Bytes of a token in the files of a tokenizer, where it does not say how large they are."""

SMALL = 1 << 16
"""Bytes of the manifest, the configs and the chat template."""


def check_disk(capture: Capture) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        InputError: With both numbers.
    """
    needed = most_bytes(capture)
    there = capture.folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        less = "keep: {topk: {k: 16}}" + (", states_width: 256" if capture.layers else "")
        raise InputError(
            f"the cache may take {_size(needed)}, and the disk of {there} has "
            f"{_size(free)} left; write another path, or keep less: {less}"
        )


def most_bytes(capture: Capture) -> float:
    """Bytes that are still to be written, at most."""
    left = [part for part in capture.parts if not capture.is_whole(part)]
    needed = SPARE * sum(capture.bytes(part) for part in left)
    needed += OF_NOTE * len(capture.parts) * (1 + len(capture.columns) / 8)
    needed += index.OF_EXAMPLE * sum(len(part.places) for part in capture.parts)
    return needed if (capture.folder / UNFINISHED).exists() else needed + _beside(capture)


def _beside(capture: Capture) -> float:
    """Bytes of what is written before the shards: head, frames, and the teacher's small files."""
    needed = SMALL + _tokenizer_bytes(capture.run.kwargs["processing_class"])
    if capture.estimator.example() is None:
        needed += (capture.vocabulary + 1) * capture.row_bytes  # each token as wide as a row
    if capture.layers is not None:
        needed += capture.layers.frame_bytes
    return needed


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase | None) -> float:
    """Bytes of its files, about: some tens of megabytes for many tokens."""
    backend: Any = None if tokenizer is None else vars(tokenizer).get("_tokenizer")
    if tokenizer is None or backend is None:
        return 0.0 if tokenizer is None else OF_TOKEN * len(tokenizer)
    listed = OF_TOKEN * len(tokenizer.added_tokens_decoder)  # which stand in two files
    return float(len(backend.to_str(pretty=True).encode()) + listed)


def _size(count: float) -> str:
    """Bytes in words.

    >>> _size(3.2e9)
    '3.2 GB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
