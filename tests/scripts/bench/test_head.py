"""`head` on a few rows: every arm computes the same, and rivals that are not here are said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.bench import rivals
from scripts.bench.run import execute
from scripts.bench.settings import HeadSettings

if TYPE_CHECKING:
    from scripts.bench.report import Report, Result

RIVALS = ["TRL chunked", "Liger 1024", "Liger 128", "Liger 128 compiled"]


def small(**changes: object) -> HeadSettings:
    given = {
        "rows": 8,
        "vocab": 64,
        "student_width": 16,
        "teacher_width": 32,
        "chunk": 3,
        "rounds": 1,
        "memory": False,
    }
    return HeadSettings(**given | changes)  # type: ignore[arg-type]  # names with their values


def reported(**changes: object) -> Report:
    return execute("head", small(**changes), ["head"], lambda text: None)


def compared(report: Report) -> list[Result]:
    return [result for result in report.results if result.kind in ("ours", "dense")]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("reference", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_arms_agree_with_the_dense_way(dtype: str, reference: str) -> None:
    report = reported(dtype=dtype, reference=reference)
    assert {report.verdict(result) for result in compared(report)} == {"same"}
    assert {result.name for result in compared(report)} == {
        "ours",
        "ours + CE on labels",
        "ours, a user's own",
        "ours, frozen head",
        "dense autograd",
        "dense + checkpoint",
    }


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("loss", ["reverse_kl", "jsd:beta=0.3", "tvd", "skew_forward_kl:alpha=0.2"])
def test_other_divergences(loss: str) -> None:
    report = reported(loss=loss)
    users = report.result("ours, a user's own")
    assert users is not None
    assert users.missing == "only beside --loss forward_kl, of which it is a copy"
    ran = [result for result in compared(report) if result is not users]
    assert {report.verdict(result) for result in ran} == {"same"}


@pytest.mark.usefixtures("alone")
def test_rivals_that_are_not_installed_are_said() -> None:
    report = reported()
    assert {r.name: r.missing for r in report.results if r.kind == "rival"} == dict.fromkeys(
        RIVALS, "not installed"
    )


@pytest.mark.usefixtures("alone")
def test_a_frozen_head_has_no_gradient_to_compare() -> None:
    frozen = reported(arms=("frozen",)).results
    assert [(r.name, sorted(r.errors)) for r in frozen] == [
        ("ours, frozen head", ["hidden", "loss"])
    ]


def test_a_rival_that_fails_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(package: str, module: str) -> object:
        raise OSError(f"{package} has no {module}")

    monkeypatch.setattr(rivals, "load", broken)
    report = reported(arms=("ours", "TRL"))
    missing = report.result("TRL chunked")
    assert missing is not None
    assert missing.missing == "failed: OSError: trl has no trl.trainer.distillation_trainer"


def test_a_loss_that_rivals_do_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        _chunked_divergence_loss = LigerFusedLinearJSDLoss = None

    monkeypatch.setattr(rivals, "load", lambda package, module: Module)
    results = reported(loss="tvd", arms=("TRL", "Liger")).results
    assert {result.missing for result in results} == {rivals.NO_BETA}


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd:beta=0.3"])
@pytest.mark.parametrize("arm", ["TRL chunked", "Liger 128"])
@pytest.mark.filterwarnings("ignore")
def test_rivals_compute_the_same_where_they_are_installed(arm: str, loss: str) -> None:
    pytest.importorskip("trl" if arm.startswith("TRL") else "liger_kernel")
    report = reported(loss=loss, arms=(arm,), rows=9)
    assert [report.verdict(result) for result in report.results if result.name == arm] == ["same"]


@pytest.mark.usefixtures("alone")
def test_ratios_are_to_the_floors_of_the_same_run() -> None:
    report = reported()
    assert list(report.columns) == ["x whole", "x whole, alloc.", "x chunked"]
    for column, arm in (("x whole", "4 GEMMs, whole"), ("x chunked", "4 GEMMs, chunked")):
        floor = report.result(arm)
        assert floor is not None
        assert report.ratios(floor)[column] == (1.0, 1.0)


@pytest.mark.usefixtures("alone")
def test_without_its_floor_a_ratio_is_left_out() -> None:
    report = reported(arms=("ours",))
    assert [report.ratios(result) for result in report.results] == [{}] * len(report.results)


def test_facts() -> None:
    facts = reported(arms=("dense autograd",)).facts
    assert facts["logits_mib"] == 8 * 64 * 4 / 2**20
    assert facts["gradients_mib"] == (64 + 8) * 16 * 4 / 2**20
    assert facts["gflop"] == 2 * 8 * 64 * (3 * 16 + 32) / 1e9
