"""Clocks and rounds: arms interleaved in one process, one untimed round first."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

Run = Callable[[], Tensor | None]
"""One forward and backward of an arm; returns the loss, or None where there is none."""


@dataclass(frozen=True)
class Times:
    """Seconds of the timed rounds of one arm.

    Attributes:
        seconds: CPU seconds of this process on a CPU, seconds of the stream on a GPU.
        wall: Seconds by the clock on the wall.
    """

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def least(self) -> float:
        """The minimum."""
        return min(self.seconds)

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.seconds)


def interleaved(
    runs: Mapping[str, Run], *, rounds: int, device: str, before: Callable[[], None]
) -> dict[str, Times]:
    """Time arms round-robin: A B C A B C … Each has run once before, untimed.

    Args:
        runs: What each arm does.
        rounds: Runs of each.
        device: `cpu` or `cuda`.
        before: Called before every run, outside of the timed region.
    """
    times = {name: Times() for name in runs}
    clock = _cuda if device == "cuda" else _cpu
    gc.collect()
    gc.freeze()  # what is there stays: the collections between runs look at new objects only
    for _ in range(rounds):
        for name, run in runs.items():
            before()
            gc.collect()
            seconds, wall = clock(run)
            times[name].seconds.append(seconds)
            times[name].wall.append(wall)
    gc.unfreeze()
    return times


def _cpu(run: Run) -> tuple[float, float]:
    """CPU seconds: another job on the machine does not count."""
    wall, start = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - start, time.perf_counter() - wall


def _cuda(run: Run) -> tuple[float, float]:
    """Seconds of the stream between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall
