"""Rounds are interleaved, and clocks count."""

from __future__ import annotations

import time

import pytest
import torch

from scripts.bench.measure import Times, interleaved


def test_arms_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(runs, rounds=2, device="cpu", before=lambda: order.append("-"))
    assert "".join(order) == "-a-b-c-a-b-c"
    assert [len(times[name].seconds) for name in "abc"] == [2, 2, 2]


def test_cpu_seconds_are_work_and_not_waiting() -> None:
    def sleep() -> None:
        time.sleep(0.1)

    times = interleaved({"sleep": sleep}, rounds=1, device="cpu", before=lambda: None)
    assert times["sleep"].least < 0.05
    assert times["sleep"].wall[0] >= 0.1


def test_minimum_and_median() -> None:
    times = Times(seconds=[3.0, 1.0, 2.0])
    assert (times.least, times.middle) == (1.0, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_its_events() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    times = interleaved({"mm": lambda: x @ x}, rounds=3, device="cuda", before=lambda: None)
    assert 0 < times["mm"].least <= times["mm"].wall[0] * 1.5
