"""Peaks of fresh processes."""

from __future__ import annotations

import sys

import pytest

from scripts.bench import peak
from scripts.bench.settings import HeadSettings

SETTINGS = HeadSettings(rows=256, vocab=32_000, student_width=16, teacher_width=16, chunk=32)
LOGITS = 256 * 32_000 * 4 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_dense_way_holds_all_logits_and_ours_a_chunk() -> None:
    found = {arm: peak.of("head", SETTINGS, arm) for arm in ("ours", "dense autograd")}
    assert found["dense autograd"].used > 3 * LOGITS
    assert found["ours"].used < 1 * LOGITS
    assert found["ours"].reserved is None


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)no such arm: the process .*StopIteration"):
        peak.of("head", SETTINGS, "no such arm")
