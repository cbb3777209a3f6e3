"""Every block of the README runs, and its table names everything that is public."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

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
    assert len([line for line in block.splitlines() if line.strip()]) <= 18


def test_loss_of_ones_own_works() -> None:
    scope: dict[str, Any] = {"F": F}
    exec(compile(blocks("python")[1], "README.md", "exec"), scope)
    objective = llm_distill.HiddenStates(loss=scope["huber"])
    assert objective.loss(torch.zeros(3, 4), torch.ones(3, 4)).shape == (3,)


def test_recipe_block_runs(models: dict[str, str], tmp_path: Path) -> None:
    from llm_distill.cli import main

    parsed = yaml.safe_load(localised(blocks("yaml")[0], models))
    parsed["training"] |= {
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 1e-5,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
    }
    parsed["data"]["max_length"] = 32
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(parsed))
    assert main(["check", str(recipe)]) == 0
    assert main(["run", str(recipe)]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


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
