"""Every block of the README runs, and its table names everything that is public."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import llm_distill
from llm_distill import heads, layers, projectors, schedules
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Local stand-ins for the Hub ids of the README."""
    known = tiny.tokenizer()
    found = {}
    for hub, role in (("Qwen/Qwen3-0.6B", "student"), ("Qwen/Qwen3-8B", "teacher")):
        tiny.llama(role).save_pretrained(tmp_path / role)
        known.save_pretrained(tmp_path / role)
        found[hub] = str(tmp_path / role)
    text = tmp_path / "stories.jsonl"
    line = '{{"text": "w{} w{} w9 w{} w11 w12"}}\n'
    text.write_text("".join(line.format(k % 90 + 3, k % 50 + 4, k % 7 + 5) for k in range(60)))
    return found | {"roneneldan/TinyStories": str(text)}


def localised(block: str, names: dict[str, str]) -> str:
    for hub, path in names.items():
        block = block.replace(hub, path)
    return block


def test_python_block_distils(models: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    """As written, but for the names of models and data, the number of steps, and the processor."""
    block = localised(blocks("python")[0], models)
    stories = models["roneneldan/TinyStories"]
    changes = {
        f'load_dataset("{stories}", split="train[:20000]")': (
            f'load_dataset("json", data_files="{stories}", split="train")'
        ),
        '"out", max_steps=1000': '"out", use_cpu=True, report_to=[], max_steps=2',
    }
    for old, new in changes.items():
        assert old in block
        block = block.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["trainer"].state.global_step == 2
    assert (tmp_path / "student" / "model.safetensors").exists()
    assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_loss_of_ones_own_works() -> None:
    scope: dict[str, Any] = {"F": F}
    exec(compile(blocks("python")[1], "README.md", "exec"), scope)
    objective = llm_distill.HiddenStates(loss=scope["l1"])
    assert objective.loss(torch.zeros(3, 4), torch.ones(3, 4)).shape == (3,)


def test_recipe_block_runs(models: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    """As written, but for models and data, the length, the steps, and the processor."""
    from llm_distill.cli import main

    block = localised(blocks("yaml")[0], models)
    changes = {"max_steps: 1000, bf16: true": "use_cpu: true", "max_length: 512": "max_length: 32"}
    for old, new in changes.items():
        assert old in block
        block = block.replace(old, new)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for line in blocks("text")[0].splitlines()]
    check, draw, run, launch = commands
    assert check[0] == draw[0] == run[0] == "llm-distill"
    assert main(check[1:]) == 0
    assert main(draw[1:]) == 0
    assert (tmp_path / "out/student/map-HiddenStates.png").exists()
    assert run[-2:] == ["--training.max_steps", "50"]
    assert main([*run[1:-1], "2"]) == 0
    assert (tmp_path / "out/student/model.safetensors").exists()
    # tests/cli/test_run.py launches two processes in this way.
    assert launch == ["accelerate", "launch", "-m", "llm_distill", "run", "recipe.yaml"]


def test_the_teacher_on_another_machine_is_one() -> None:
    from llm_distill.recipe import Recipe, document

    section = document.parse(blocks("yaml")[1], "README")
    made = Recipe.of({"student": "me/s", "data": {"path": "me/d"}, **section})
    assert isinstance(made.teacher, llm_distill.Remote)


def test_commands_exist() -> None:
    for command in blocks("bash"):
        script = command.split()[1]
        assert (ROOT / script).exists()
    assert [c.strip() for c in blocks("bash")] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
    ]


def test_table_names_everything_public() -> None:
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", table))
    public = {*llm_distill.__all__, *layers.__all__, *heads.__all__, *projectors.__all__}
    assert public | set(schedules.__all__) <= named | {"LayerMap"}
