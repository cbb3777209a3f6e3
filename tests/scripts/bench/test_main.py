"""The command line, from arguments to files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import __main__ as command
from scripts.bench.settings import HeadSettings, StepSettings

ROOT = Path(__file__).resolve().parents[3]
HEAD = "head --rows 8 --vocab 64 --student-width 16 --teacher-width 32 --rounds 1 --no-memory"
STEP = "step --batch 2 --length 8 --vocab 64 --rounds 1 --no-memory"
STEP += " --student-layers 1 --student-width 64 --teacher-layers 1 --teacher-width 64"


def settled(text: str) -> Any:
    return command.settled(command.parser().parse_args(text.split()))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("arguments", [HEAD, STEP], ids=["head", "step"])
def test_table_json_and_markdown(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, section = tmp_path / "out.json", tmp_path / "RESULTS.md"
    argv = [*arguments.split(), "--json", str(out), "--markdown", str(section)]
    assert command.main(argv) == 0
    shown = capsys.readouterr().out
    assert "dense" in shown
    assert "not installed" in shown
    content = json.loads(out.read_text())
    assert set(content) == {
        "benchmark",
        "title",
        "settings",
        "facts",
        "machine",
        "denominators",
        "arms",
    }
    assert content["machine"]["command"] == f"python -m scripts.bench {' '.join(argv)}"
    ours = next(arm for arm in content["arms"] if arm["name"] == "ours")
    assert ours["verdict"] == "same"
    assert ours["min"] > 0
    assert all(set(ratio) == {"min", "median"} for ratio in ours["ratios"].values())
    assert set(ours["ratios"]) == set(content["denominators"])
    assert f"## {content['title']}" in section.read_text()


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*HEAD.split(), "--loss", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("bench: there is no divergence 'nonsense'; there are")


def test_defaults() -> None:
    assert settled("head --device cpu") == HeadSettings()
    assert settled("step --device cpu") == StepSettings()


def test_defaults_that_depend_on_others() -> None:
    assert settled("head --device cpu --dtype bfloat16").chunk == 512
    assert settled("head --device cuda").chunk == 2048
    assert settled("head --device cuda").rounds == 20
    assert settled("head --device cuda --chunk 64 --rounds 3").chunk == 64


def test_arms_are_chosen_by_parts_of_their_names() -> None:
    settings = settled("head --device cpu --arms ours,GEMMs")
    assert settings.arms == ("ours", "GEMMs")
    assert settings.wants("4 GEMMs, whole")
    assert settings.wants("Ours + CE")
    assert not settings.wants("dense autograd")


def test_settings_survive_json() -> None:
    settings = settled("step --device cpu --prompt 0.5 --arms a,b")
    assert StepSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("head --rows 0", "0 is too few; write 1 or more"),
        ("step --prompt 1.0", "1.0 is no fraction from 0 to below 1"),
        ("head --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(arguments.split())
    assert said in capsys.readouterr().err


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from scripts.bench.__main__ import parser\n"
        "try:\n    parser().parse_args(['head', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--student-width" in run.stdout
    assert run.stdout.endswith("set()\n")
    assert time.perf_counter() - start < 5  # A fraction of a second, unless all cores are busy.
