"""A text of a few thousand bytes, and lines that were never trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from scripts.bench.mapping import pool
from scripts.bench.mapping.jobs import Lines
from scripts.bench.mapping.plan import DATA, HAND, Plan
from scripts.bench.mapping.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS: dict[str, Any] = {
    name: [[1 + place % 3, [[1 + place // 3, 1.0]]], [4, [[12, 1.0]]]]
    for place, name in enumerate((*HAND, *DATA))
} | {"reverse": [[1, [[12, 1.0]]], [4, [[3, 1.0]]]]}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings stay errors, and the environment is put back."""
    monkeypatch.setattr(pool, "quiet", lambda: None)
    for name in pool.QUIET:
        monkeypatch.setenv(name, pool.QUIET[name])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {k} of a text about nothing at all.\n" for k in range(150)))
    return path


@pytest.fixture
def settings() -> Settings:
    """Of the real size; two maps are drawn."""
    return replace(Settings(), maps=4)


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    return Lines(tmp_path / "work" / "results.jsonl")


def finish(plan: Plan, kl: Callable[[Any], float]) -> None:
    """Make up results for everything that is pending, until nothing is."""
    while jobs := plan.pending():
        for job in jobs:
            plan.lines.add(job, made_up(job, kl))


def made_up(job: Any, kl: Callable[[Any], float]) -> dict[str, Any]:
    """A line as `runs.do` would give."""
    if job.kind == "models":
        return {"teacher_ce": 1.5, "cpu": 1.0}
    if job.kind == "maps":
        drawn = {
            f"drawn {k}": [[1, [[1 + k, 1.0]]], [2, [[6, 1.0]]], [3, [[9, 1.0]]], [4, [[12, 1.0]]]]
            for k in range(4)
        }
        alike = [[1 - abs(i - j) / 20 for j in range(13)] for i in range(13)]
        return {"maps": ROWS | drawn, "similarity": alike, "cpu": 1.0}
    value = kl(job)
    line = {"kl": value, "documents": [value - 0.01, value + 0.01], "before": 0.5, "cpu": 2.0}
    if job.mode == "race":
        winner = {"name": "uniform", "weight": 3.0, "blockwise": 0.0, "rows": ROWS["uniform"]}
        line |= {"winner": winner, "race_steps": 100, "race": []}
    return line
