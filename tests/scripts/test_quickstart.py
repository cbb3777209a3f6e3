"""The whole quickstart with two steps on a little text, and its door."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from scripts import quickstart
from scripts._quickstart import corpus, measure
from scripts._quickstart.corpus import Corpus, NoTextError
from scripts._quickstart.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def little_text() -> Corpus:
    lines = [line for topic in corpus.language_reference().values() for line in topic][:90]
    return Corpus("\n".join(lines[:80]) + "\n", "\n".join(lines[80:]) + "\n")


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=120, highlight=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    monkeypatch.setattr(corpus, "read_corpus", little_text)
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "NEW_TOKENS", 5)
    return Settings(output=tmp_path / "out", seed=0, steps=2, teacher_steps=2)


def said(console: Console) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the fixture gives it a StringIO
    return text


def test_from_text_to_verdict(
    small: Settings, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.run(small, console)
    shown = said(console)
    for expected in ("teacher", "SFT twin", "distilled", "KL to teacher", "tokens/s"):
        assert expected in shown
    plan = capsys.readouterr().out
    for objective in ("CrossEntropy", "Logits", "HiddenStates", "AttentionMaps", "1 | 3 of 6"):
        assert objective in plan
    assert "'train_runtime'" not in shown + plan

    report = json.loads((small.output / "report.json").read_text())
    assert (report["seed"], report["steps"], report["teacher_steps"]) == (0, 2, 2)
    assert report["verdict"] in " ".join(shown.split())
    teacher, twin, distilled = report["models"]
    assert (teacher["kl"], teacher["agreement"]) == (0.0, 1.0)
    assert twin["parameters"] == distilled["parameters"] < teacher["parameters"] / 10
    for model in (twin, distilled):
        assert model["kl"] > 0
        assert 0 <= model["agreement"] <= 1
        assert math.isfinite(model["perplexity"])
    assert twin["perplexity"] != distilled["perplexity"]

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        small.student("distilled"), output_loading_info=True
    )
    found, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert found.config.num_hidden_layers == 2

    quickstart.run(small, console)
    again = json.loads((small.output / "report.json").read_text())
    assert "from an earlier run with the same settings" in " ".join(said(console).split())
    keys = "perplexity", "kl", "agreement", "sample"
    for before, after in zip(report["models"], again["models"], strict=True):
        assert [before[key] for key in keys] == [after[key] for key in keys]


def test_python_without_text_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Corpus:
        raise NoTextError("this Python has 2 characters")

    monkeypatch.setattr(corpus, "read_corpus", refuse)
    monkeypatch.setattr(quickstart, "quiet", lambda: None)
    assert quickstart.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "quickstart: this Python has 2 characters\n"


def test_third_parties_are_quiet() -> None:
    code = (
        "from scripts.quickstart import quiet\n"
        "quiet()\n"
        "import warnings, datasets, transformers\n"
        "warnings.warn('noise')\n"
        "transformers.logging.get_logger('transformers.x').warning('noise')\n"
        "datasets.Dataset.from_list([{'a': 1}]).map(lambda row: row, new_fingerprint='x')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout + run.stderr == ""


def test_defaults_are_those_of_the_readme() -> None:
    expected = Settings(output=Path("out/quickstart"), seed=0, steps=300, teacher_steps=700)
    assert quickstart.parse([]) == expected


def test_options_are_read() -> None:
    argv = ["--seed", "3", "--steps", "4", "--teacher-steps", "5", "--output", "there"]
    expected = Settings(output=Path("there"), seed=3, steps=4, teacher_steps=5)
    assert quickstart.parse(argv) == expected


@pytest.mark.parametrize("option", ["--steps", "--teacher-steps"])
def test_no_steps_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quickstart.parse([option, "0"])
    assert stop.value.code == 2
    assert f"argument {option}: 0 steps train nothing; write 1 or more" in capsys.readouterr().err


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from scripts.quickstart import parse\n"
        "try:\n    parse(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules))"
    )
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--teacher-steps" in run.stdout
    assert run.stdout.endswith("set()\n")
    assert time.perf_counter() - start < 5  # A fraction of a second, unless all cores are busy.
