"""The file that remembers finished jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scripts.bench.mapping.jobs import Job, Lines, rows_of

if TYPE_CHECKING:
    from pathlib import Path

JOB = Job("a", "run", 3, ((1, ((2, 0.25), (3, 0.75))), (2, ((4, 1.0),))), 3.0, steps=10)


def test_what_is_added_is_there_at_the_next_start(tmp_path: Path) -> None:
    Lines(tmp_path / "x" / "results.jsonl").add(JOB, {"kl": 0.5})
    again = Lines(tmp_path / "x" / "results.jsonl")
    line = again.get(JOB)
    assert line is not None
    assert (line["kl"], line["pair"], line["seed"]) == (0.5, "a", 3)
    assert again.get(replace(JOB, weight=1.0)) is None
    assert len(again) == 1


def test_a_line_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = Lines(path)
    lines.add(JOB, {"kl": 0.5})
    with path.open("a") as file:
        file.write('{"key": "half')
    again = Lines(path)
    assert len(again) == 1
    other = replace(JOB, seed=4)
    again.add(other, {"kl": 0.25})
    found = Lines(path).get(other)
    assert found is not None
    assert found["kl"] == 0.25


def test_rows_survive_json() -> None:
    assert JOB.mapping is not None
    entries = [[s, [list(entry) for entry in teacher]] for s, teacher in JOB.mapping]
    assert rows_of(entries) == JOB.mapping
