"""Recipes run to their end, and those that fail are told."""

from pathlib import Path

import pytest

from scripts.bench import __main__ as command
from scripts.bench.kinds import command as kinds
from scripts.bench.kinds.command import FIGURES, Ended, run_all
from scripts.bench.kinds.recipes import Kind


@pytest.mark.parametrize("name", ["Remote", "Cached, hybrid", "shard: tp"])
def test_it_runs_to_its_end(quickstart: Path, name: str) -> None:
    (done,) = run_all(quickstart, 2, name)
    assert done.error == ""
    assert done.kind.name in done.cells()[0]
    assert set(FIGURES[:2]) <= done.figures.keys()
    assert done.cells()[2] == f"{done.figures['eval_perplexity']:.1f}"


def test_what_fails_is_told(
    quickstart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Kind("no teacher", str(quickstart / "nobody"))
    monkeypatch.setattr(kinds, "kinds", lambda *_: [wrong])
    asked = ["kinds", "--folder", str(quickstart), "--steps", "1"]
    assert command.main(asked) == 1
    told = capsys.readouterr()
    assert "is not a folder here" in told.err
    assert "failed" in told.out


def test_the_quickstart_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kinds", "--folder", str(tmp_path)]) == 1
    assert "has no teacher; run bash scripts/quickstart.sh" in capsys.readouterr().err


def test_a_table_is_appended(
    quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"eval_perplexity": 90.25, "eval_kl": 0.1234, "eval_agreement": 0.731}
    ended = [Ended(Kind("Local", "there"), figures, 12.3), Ended(Kind("Ema", "Ema"), {}, 1.0, "oh")]
    monkeypatch.setattr(kinds, "run_all", lambda *_: iter(ended))
    path = tmp_path / "results.md"
    asked = ["kinds", "--folder", str(quickstart), "--markdown", str(path)]
    assert command.main(asked) == 1
    text = path.read_text(encoding="utf-8")
    assert "| Local | 1 | 90.2 | 0.123 | 73.1 | 12 |" in text
    assert "| Ema | 1 | failed | - | - | - |" in text
