from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console, RenderableType

from scripts._quickstart import report
from scripts._quickstart.measure import Row

if TYPE_CHECKING:
    from pathlib import Path

TWIN = Row("SFT twin", 140.0, 0.75, 0.5, 1000, 50_000.0, "twin [writes] this")
BETTER = {"perplexity": 120.0, "kl": 0.4, "agreement": 0.6}
WORSE = {"perplexity": 160.0, "kl": 0.9, "agreement": 0.4}


def distilled(**figures: float) -> Row:
    return replace(TWIN, name="distilled", **figures)  # type: ignore[arg-type]  # a StringIO


def shown(what: RenderableType) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return text


def test_better_in_all_figures_beats() -> None:
    said = report.verdict(TWIN, distilled(**BETTER))
    assert said.startswith("The distilled student beats its twin: perplexity 120.0 against 140.0, ")
    assert "KL to the teacher 0.400 against 0.750 nats per token" in said
    assert said.endswith("agreement 60.0% against 50.0%.")


@pytest.mark.parametrize("figures", [WORSE, {}])
def test_better_in_none_does_not_beat(figures: dict[str, float]) -> None:
    said = report.verdict(TWIN, distilled(**figures))
    assert said.startswith("The distilled student does not beat its twin: ")


def test_better_in_some_is_mixed_and_says_in_which() -> None:
    said = report.verdict(TWIN, distilled(**BETTER | {"perplexity": 150.0}))
    assert said.startswith("Mixed: the distilled student is better in KL and agreement only: ")


def test_a_figure_that_is_not_a_number_is_no_victory() -> None:
    said = report.verdict(TWIN, distilled(**BETTER | {"perplexity": float("nan")}))
    assert said.startswith("Mixed")


def test_table_has_every_figure() -> None:
    text = shown(report.table([TWIN, distilled(**BETTER)]))
    for figure in ("140.0", "0.750", "50.0%", "1,000", "50,000", "120.0", "0.400", "60.0%"):
        assert figure in text


def test_samples_are_no_markup() -> None:
    text = shown(report.samples([TWIN], "A prompt [bold]"))
    assert "twin [writes] this" in text
    assert "A prompt [bold]" in text


def test_report_is_json(tmp_path: Path) -> None:
    report.write(tmp_path / "report.json", [TWIN, distilled(**BETTER)], {"seed": 3})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["seed"] == 3
    assert [model["name"] for model in content["models"]] == ["SFT twin", "distilled"]
    assert content["models"][1]["kl"] == 0.4
