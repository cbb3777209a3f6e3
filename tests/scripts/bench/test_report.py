"""What is made of times, errors and peaks."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from scripts.bench import table
from scripts.bench.machine import Machine
from scripts.bench.measure import Times
from scripts.bench.peak import Peak
from scripts.bench.report import Report, Result
from scripts.bench.settings import HeadSettings

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.arms import Kind

MACHINE = Machine(
    processor="a processor",
    memory_gib=24.0,
    gpu=None,
    system="a system",
    load=0.5,
    backend="a library",
    versions={"torch": "2.13"},
    command="python -m scripts.bench head",
    commit="abc",
    started="now",
)


def result(name: str, kind: Kind = "ours", *seconds: float, peak: float | None = None) -> Result:
    found = Result(name, kind, times=Times(list(seconds), list(seconds)) if seconds else None)
    found.peak = None if peak is None else Peak(peak)
    return found


def report(*results: Result, lean: str | None = None, dtype: str = "float32") -> Report:
    return Report(
        benchmark="head",
        title="a title",
        settings=HeadSettings(dtype=dtype),
        facts={"logits_mib": 100.0, "gradients_mib": 50.0},
        columns={"x both": ("a", "b")},
        lean=lean,
        machine=MACHINE,
        results=results,
    )


def test_ratios_are_of_minima_and_of_medians() -> None:
    ours = result("ours", "ours", 6.0, 9.0, 30.0)
    made = report(result("a", "floor", 1.0, 2.0, 5.0), result("b", "floor", 2.0, 2.5, 3.0), ours)
    assert made.denominator("x both") == (3.0, 4.5)
    assert made.ratios(ours) == {"x both": (2.0, 2.0)}


@pytest.mark.parametrize("other", [(), (result("b", "rival"),)])
def test_no_ratio_without_all_of_the_denominator(other: tuple[Result, ...]) -> None:
    first = result("a", "floor", 1.0)
    assert report(first, *other).ratios(first) == {}


@pytest.mark.parametrize(
    ("dtype", "error", "verdict"),
    [
        ("float32", 0.9e-5, "same"),
        ("float32", 1.1e-5, "different"),
        ("float32", float("nan"), "different"),
        ("bfloat16", 1.9e-2, "same"),
        ("bfloat16", 2.1e-2, "different"),
    ],
)
def test_an_error_above_the_tolerance_is_another_computation(
    dtype: str, error: float, verdict: str
) -> None:
    arm = result("rival", "rival", 1.0)
    arm.errors = {"loss": 0.0, "head": error}
    made = report(arm, dtype=dtype)
    assert made.verdict(arm) == verdict
    assert ("different" in table.markdown(made)) == (verdict == "different")


def test_peaks_besides_the_gradients_and_beside_the_lean_arm() -> None:
    lean, ours, part = (
        result("sft", "ours", 1.0, peak=100.0),
        result("ours", "ours", 1.0, peak=110.0),
        result("teacher", "part", 1.0, peak=30.0),
    )
    made = report(lean, ours, part, lean="sft")
    assert made.above_gradients(ours) == 0.6
    assert made.leanness(ours) == 1.1
    assert made.above_gradients(part) is None
    assert replace(made, lean=None).leanness(ours) is None


def test_json_has_every_field(tmp_path: Path) -> None:
    arm = result("a", "ours", 1.0, 2.0, peak=60.0)
    table.write_json(tmp_path / "report.json", report(arm, result("b", "rival")))
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["machine"]["backend"] == "a library"
    assert content["settings"]["vocab"] == 32_000
    ours, missing = content["arms"]
    assert (ours["min"], ours["median"], ours["times"]["seconds"]) == (1.0, 1.5, [1.0, 2.0])
    assert (ours["peak"]["used"], ours["peak_above_gradients"]) == (60.0, 0.1)
    assert missing["min"] is None


def test_every_row_has_a_cell_for_every_column() -> None:
    arm = result("ours", "ours", 1.0, peak=60.0)
    arm.errors = {"loss": 1e-7}
    for lean in (None, "ours"):
        made = report(arm, result("rival", "rival"), lean=lean)
        assert {len(cells) for cells in table.rows(made)} == {len(table.heads(made))}


def test_table_says_what_is_missing() -> None:
    absent = result("rival [x]", "rival")
    absent.missing = "not installed"
    console = Console(file=StringIO(), width=160)
    console.print(table.table(report(absent)))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "not installed" in text
    assert "rival [x]" in text


def test_reports_without_logits_have_no_column_of_them() -> None:
    arm = result("no maps", "part", 1.0, peak=60.0)
    made = replace(report(arm, lean="no maps"), facts={"gradients_mib": 13.0})
    assert table.heads(made)[-3:] == ["peak MiB", "x no maps peak", "computes"]
    assert [len(cells) for cells in table.rows(made)] == [len(table.heads(made))]
    assert made.above_gradients(arm) is None
    assert "gradients that any method returns: 13 MiB" in table.caption(made)


def test_several_reports_are_a_list(tmp_path: Path) -> None:
    made = report(result("a", "ours", 1.0))
    table.write_json(tmp_path / "all.json", made, made)
    assert len(json.loads((tmp_path / "all.json").read_text())) == 2


def test_markdown_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    for _ in range(2):
        table.append_markdown(path, report(result("a", "ours", 1.0)))
    text = path.read_text()
    assert text.startswith(
        "# Benchmark results\n\n## a title\n\n| arm | min s | median s | x both |"
    )
    assert text.count("## a title") == 2
    for said in ("a processor", "torch 2.13", "commit abc", "python -m scripts.bench head\n"):
        assert said in text
