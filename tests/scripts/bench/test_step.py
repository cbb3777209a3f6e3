"""`step` on small models: every arm that is compared trains for the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.bench.models import Models
from scripts.bench.run import execute
from scripts.bench.settings import StepSettings

if TYPE_CHECKING:
    from scripts.bench.report import Report

COMPARED = {
    "SFT, our head pass",
    "SFT, dense",
    "ours",
    "ours + CE on labels",
    "ours, cached top-64",
    "naive KD",
}


def small(**changes: object) -> StepSettings:
    given = {
        "batch": 2,
        "length": 16,
        "vocab": 96,
        "student_layers": 1,
        "student_width": 64,
        "teacher_layers": 2,
        "teacher_width": 128,
        "rounds": 1,
        "memory": False,
    }
    return StepSettings(**given | changes)  # type: ignore[arg-type]  # names with their values


def reported(**changes: object) -> Report:
    return execute("step", small(**changes), ["step"], lambda text: None)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("prompt", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_arms_agree_with_the_dense_way(dtype: str, prompt: float) -> None:
    report = reported(dtype=dtype, prompt=prompt)
    verdicts = {result.name: report.verdict(result) for result in report.results}
    assert {name for name, verdict in verdicts.items() if verdict} == COMPARED
    assert {verdicts[name] for name in COMPARED} == {"same"}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("loss", ["reverse_kl", "jsd:beta=0.3", "tvd"])
def test_other_divergences(loss: str) -> None:
    report = reported(loss=loss, arms=("ours", "naive"))
    assert {report.verdict(result) for result in report.results} == {"same"}


@pytest.mark.usefixtures("alone")
def test_rivals_that_are_not_installed_are_said() -> None:
    missing = {result.name: result.missing for result in reported(prompt=0.25).results}
    for name in ("TRL GKD", "TRL Distillation", "Liger 128", "DistillKit"):
        assert missing.pop(name) == "not installed"
    assert set(missing.values()) == {None}


@pytest.mark.parametrize("prompt", [0.0, 0.5])
@pytest.mark.parametrize("arm", ["TRL GKD", "TRL Distillation", "Liger 128"])
@pytest.mark.filterwarnings("ignore")
def test_rivals_compute_the_same_where_they_are_installed(arm: str, prompt: float) -> None:
    pytest.importorskip("trl" if arm.startswith("TRL") else "liger_kernel")
    report = reported(arms=(arm,), prompt=prompt)
    assert [report.verdict(result) for result in report.results] == ["same"]


@pytest.mark.usefixtures("alone")
def test_r_and_floor_are_sums_of_the_same_run() -> None:
    report = reported()
    for column, arms in (
        ("x R", ("teacher forward with head", "SFT, our head pass")),
        ("x floor", ("teacher body", "student body, fwd + bwd", "4 head GEMMs")),
    ):
        times = [result.times for result in report.results if result.name in arms]
        expected = sum(t.least for t in times if t is not None)
        assert len(times) == len(arms)
        assert report.denominator(column) == (expected, expected)


def test_prompts_are_not_supervised() -> None:
    models = Models.build(small(prompt=0.5))
    assert int(models.supervised.sum()) == 2 * 8
    assert len(models.batch().supervised) == 2 * 8
    inputs = models.rows(models.teacher_hidden(), models.student_hidden())
    assert inputs.labels.tolist() == models.ids[:, 8:].flatten().tolist()


@pytest.mark.usefixtures("alone")
def test_rows_of_the_distiller_are_those_of_the_naive_way() -> None:
    facts = reported(arms=("teacher body",)).facts
    assert facts["rows"] == 2 * 15
    assert facts["teacher_parameters"] > facts["student_parameters"]
