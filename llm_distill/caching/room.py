"""Whether a disk can hold a cache, before the teacher is asked."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from llm_distill.caching.plan import Capture

SPARE = 1.05
"""Room that is asked for, times what the cache should take."""


def check_disk(capture: Capture) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        InputError: With both numbers.
    """
    left = [part for part in capture.parts if not capture.is_whole(part)]
    needed = SPARE * sum(capture.bytes(part) for part in left)
    if capture.estimator.example() is None:
        needed += capture.vocabulary * capture.row_bytes  # the head, as wide as a row
    there = capture.folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        less = "keep: {topk: {k: 16}}" + (", states_width: 256" if capture.layers else "")
        raise InputError(
            f"the cache would take about {_size(needed)}, and the disk of {there} has "
            f"{_size(free)} left; write another path, or keep less: {less}"
        )


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
