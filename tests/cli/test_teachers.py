"""Teachers of every kind from a recipe: trained, checked, and refused in words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import on_disk
from tests.cli.conftest import Cli
from tests.launch import completed


def routed(models: Path, folder: Path, kinds: str = "ab") -> dict[str, Any]:
    """Sections of a recipe whose data name an expert."""
    lines = [
        json.dumps({"text": on_disk.SENTENCES[k % 4], "kind": kinds[k % len(kinds)]})
        for k in range(16)
    ]
    path = folder / "routed.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    experts = {"a": str(models / "teacher"), "b": {"Local": {"model": str(models / "student")}}}
    return {
        "teacher": {"Routed": {"by": "kind", "experts": experts}},
        "data": {"path": str(path), "eval": 0.25, "max_length": 32},
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_go_to_their_experts(
    cli: Cli, models: Path, tmp_path: Path, streaming: bool
) -> None:
    """The column stays beside the tokens without being asked for."""
    sections = routed(models, tmp_path)
    if streaming:
        sections["data"] |= {"streaming": True, "eval": None}
    done = cli("run", **sections)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_name_that_no_expert_has(cli: Cli, models: Path, tmp_path: Path) -> None:
    done = cli("run", **routed(models, tmp_path, "abc"))
    assert done.code == 2
    assert "column 'kind' names 'c', and the experts are a, b" in done.err


def test_a_column_that_is_missing(cli: Cli, models: Path, tmp_path: Path) -> None:
    sections = routed(models, tmp_path)
    done = cli("run", teacher=sections["teacher"])
    assert done.code == 2
    assert "has no column 'kind', which is to be kept; it has text" in done.err


@pytest.mark.parametrize(
    ("teacher", "objectives"),
    [
        ("BornAgain", ["CrossEntropy", "Logits"]),
        ({"Ema": {"decay": 0.9}}, ["CrossEntropy", "Logits"]),
        ("DeepToShallow", ["CrossEntropy", {"Logits": {"exit": 1}}]),
    ],
)
def test_the_student_itself(cli: Cli, tmp_path: Path, teacher: Any, objectives: list[Any]) -> None:
    assert cli("check", teacher=teacher, objectives=objectives).code == 0
    done = cli("run", teacher=teacher, objectives=objectives)
    assert done.code == 0, done.err
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in files
    assert "teacher.safetensors" not in files


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("AdapterOff", "the student has no adapters to leave out"),
        ("DeepToShallow", "Logits: the last layer would learn from itself"),
    ],
)
def test_what_cannot_be_is_found_by_check(cli: Cli, teacher: str, message: str) -> None:
    done = cli("check", teacher=teacher)
    assert done.code == 2
    assert message in done.err


MAPS = {"AttentionMaps": {"layers": {"explicit": {"pairs": [[1, 2]]}}}}


@pytest.mark.parametrize(
    ("teacher", "sections", "message"),
    [
        ("AdapterOff", {"peft": {"r": 4, "init_lora_weights": "pissa"}}, "pissa rewrites the weig"),
        ("AdapterOff", {"peft": {"r": 4, "bias": "all"}}, "bias: all trains biases of the base"),
        (
            "AdapterOff",
            {"peft": {"r": 4}, "objectives": ["Logits", "AttentionMaps"]},
            "gives logits and hidden states, and attention of blocks [1, 2] is asked for",
        ),
        (
            "DeepToShallow",
            {"objectives": ["CrossEntropy", MAPS]},
            "gives logits and hidden states, and attention of blocks [2] is asked for",
        ),
    ],
)
def test_what_the_students_own_weights_cannot_be(
    cli: Cli, teacher: str, sections: dict[str, Any], message: str
) -> None:
    for command in ("check", "run"):
        done = cli(command, teacher=teacher, **sections)
        assert done.code == 2
        assert message in done.err


def test_a_map_of_several_teachers_is_refused(cli: Cli, models: Path) -> None:
    members = [str(models / "teacher")] * 2
    sections: dict[str, Any] = {
        "teacher": {"Ensemble": {"members": members}},
        "objectives": ["Logits", {"HiddenStates": {"member": 1}}],
    }
    done = cli("map", **sections)
    assert done.code == 2
    assert "HiddenStates maps layers of one of several teachers" in done.err
    assert cli("run", **sections).code == 0


@pytest.mark.parametrize("word", ["bitsandbytes_4bit", "torchao_int8"])
def test_a_quantised_teacher(cli: Cli, models: Path, tmp_path: Path, word: str) -> None:
    """It says what it saves and adds; resumed, the figure is read."""
    teacher = {"Local": {"model": str(models / "teacher"), "quantize": word}}
    assert cli("check", teacher=teacher).code == 0
    done = cli("run", "--training.save_strategy=steps", "--training.save_steps=1", teacher=teacher)
    assert done.code == 0, done.err
    assert re.search(rf"{word}, 0\.\d MB instead of 0\.\d MB", done.out)
    assert f"{word} adds a KL of" in done.out
    assert f"{word} adds a KL of" in (tmp_path / "out" / "README.md").read_text()
    kept = tmp_path / "out" / "added_kl.json"
    before = kept.stat().st_mtime_ns
    resumed = cli("run", "--resume", "--training.max_steps=3", teacher=teacher)
    assert resumed.code == 0, resumed.err
    assert kept.stat().st_mtime_ns == before
    assert f"{word} adds a KL of" in resumed.out


def test_a_measurement_alone_is_no_training(cli: Cli, models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "added_kl.json").write_text("{}", encoding="utf-8")
    assert cli("run").code == 0


def test_a_quantised_student(cli: Cli, models: Path) -> None:
    student = {"Local": {"model": str(models / "student"), "quantize": "torchao_int8"}}
    done = cli("check", student=student)
    assert done.code == 2
    assert "is for teachers" in done.err


def test_a_cache_beside_experts(cli: Cli, models: Path, tmp_path: Path) -> None:
    """The examples of a cache are named without the column that the experts go by."""
    sections = routed(models, tmp_path)
    sections["teacher"]["Routed"]["experts"]["b"] = str(models / "teacher")
    kept = {"path": str(tmp_path / "kept"), "of": str(models / "teacher"), "keep": "hidden"}
    made = cli("cache", teacher={"Cached": kept}, data=sections["data"])
    assert made.code == 0, made.err
    members = [sections["teacher"], {"Cached": {"path": kept["path"]}}]
    done = cli("run", teacher={"Ensemble": {"members": members}}, data=sections["data"])
    assert done.code == 0, done.err


def test_what_one_process_meets_is_told(cli: Cli, models: Path, tmp_path: Path) -> None:
    """A stream is looked up batch by batch: here the second process alone misses an example."""
    lines = [json.dumps({"text": f"{on_disk.SENTENCES[k % 4]} {k}"}) for k in range(16)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    kept = {"Cached": {"path": str(tmp_path / "kept"), "of": str(models / "teacher")}}
    made = cli("cache", teacher=kept, data={"path": str(path), "max_length": 32})
    assert made.code == 0, made.err
    lines[6] = json.dumps({"text": "a dog that nobody cached"})
    path.write_text("\n".join(lines), encoding="utf-8")
    recipe = on_disk.document(models) | {
        "teacher": kept,
        "data": {"path": str(path), "max_length": 32, "streaming": True},
    }
    recipe["training"] |= {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = completed("llm_distill", "run", str(tmp_path / "recipe.yaml"), ranks=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("llm-distill")]
    assert len(told) == 1
    assert "llm-distill process 1: " in told[0]
    assert "1 of the 4 examples of this batch are not in the cache" in told[0]
