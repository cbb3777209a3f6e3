"""Tables, verdicts and plots from made-up results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.bench.mapping import report
from scripts.bench.mapping.plan import Plan
from scripts.bench.mapping.tables import Results, named, shown
from tests.scripts.bench.mapping.conftest import finish
from tests.scripts.bench.mapping.test_plan import name_of

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.mapping.jobs import Job, Lines
    from scripts.bench.mapping.settings import Settings

LARGEST = 150_000
"""Bytes of a plot."""

LOST = {1: 0.10, 2: 0.07, 3: 0.06, 4: 0.07}
"""Way from all blocks to the ends of their segments, by where the first one ends: exactly.

The way to the nearer target is .10, .09, .09 and .11: rank correlation -1/2."""


def kl(job: Job) -> float:
    """coverage and the race are 3 % better than everything else, last is the best by hand."""
    if job.mode == "race":
        return 0.95 + 0.001 * job.seed
    name = name_of(job)
    if job.mapping is not None and len(job.mapping) == 4:  # drawn
        return 1.0 + LOST[job.mapping[0][1][0][0]]
    value = {"coverage": 0.97, "auto": 0.97, "last": 0.99}.get(name, 1.0)
    return value + 0.001 * job.seed + 0.01 * (job.weight != 1.0 and name != "none")


@pytest.fixture
def plan(settings: Settings, lines: Lines) -> Plan:
    made = Plan(settings, "a", lines)
    finish(made, kl)
    return made


def test_the_whole_report(plan: Plan, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "MAPPING.md"
    report.write(path, settings, [plan], {"Machine": "none"})
    text = path.read_text()
    assert "`auto`: reached." in text
    assert "- (a) auto_race is better than the best map by hand (last)" in text
    assert "| uniform x 3 | 8 of 8 |" in text
    assert "Race: 100 steps beside 200" in text
    assert "| **auto** |" in text
    assert "### (a) Which blocks the student starts from" in text
    assert "| (a) | -0.50 | -1.00 | 4 |" in text
    for name in ("mapping_a.png", "mapping_scores.png"):
        assert f"figures/{name}" in text
        size = (tmp_path / "figures" / name).stat().st_size
        assert 1_000 < size < LARGEST


def test_the_best_weight_is_marked(plan: Plan) -> None:
    row = next(line for line in Results(plan).weights() if line.startswith("| last |"))
    assert row == "| last | 1.0005 | **0.9905** | 1.0005 | 1.0005 |"


def test_differences_are_over_common_seeds(plan: Plan) -> None:
    results = Results(plan)
    assert results.best == "last"
    found = results.versus("auto", "last")
    assert found is not None
    assert found.seeds == 8
    assert found.mean == pytest.approx(100 * (0.9735 / 0.9935 - 1))
    other = results.versus("cka", "last")
    assert other is not None
    assert other.seeds == 3
    assert results.versus("cka", None) is None


def test_nothing_finished_is_no_verdict(settings: Settings, lines: Lines, tmp_path: Path) -> None:
    path = tmp_path / "MAPPING.md"
    report.write(path, settings, [Plan(settings, "a", lines)], {})
    assert "`auto`: not decided" in path.read_text()
    assert not (tmp_path / "figures").exists()


def test_words() -> None:
    assert shown(((1, ((3, 1.0),)), (2, ((4, 0.5), (5, 0.5))))) == "1←3 2←mix"
    assert named({"rows": None}) == "none"
    raced = {"rows": [], "name": "last 1", "weight": 3.0, "blockwise": 1 / 3}
    assert named(raced) == "last 1 x 3, blockwise 0.33"
