"""`hidden` on small models: matches cost time, and every arm trains for what it says."""

from __future__ import annotations

import pytest

from scripts.bench.run import execute
from scripts.bench.settings import HiddenSettings


def small(**changes: object) -> HiddenSettings:
    given = {
        "batch": 2,
        "length": 16,
        "vocab": 96,
        "student_layers": 4,
        "student_width": 64,
        "teacher_layers": 5,
        "teacher_width": 128,
        "rounds": 1,
        "memory": False,
    }
    return HiddenSettings(**given | changes)  # type: ignore[arg-type]  # names with their values


@pytest.mark.parametrize("prompt", [0.0, 0.5])
def test_all_arms_agree_with_all_logits_and_all_states(prompt: float) -> None:
    report = execute("hidden", small(prompt=prompt), ["hidden"], lambda text: None)
    verdicts = {result.name: report.verdict(result) for result in report.results}
    assert verdicts == {
        "logits alone": "same",
        "+ 2 hidden states": "same",
        "+ 4 hidden states": "same",
    }
    losses = [result.loss for result in report.results]
    assert len(set(losses)) == 3
    assert set(report.columns) == {"x logits alone"}


def test_no_more_matches_than_layers() -> None:
    report = execute("hidden", small(student_layers=2), ["hidden"], lambda text: None)
    assert [result.name for result in report.results] == ["logits alone", "+ 2 hidden states"]


def test_settings_for_a_warm_up_are_small() -> None:
    tiny = HiddenSettings().tiny()
    assert (tiny.student_layers, tiny.length, tiny.batch) == (4, 8, 1)
