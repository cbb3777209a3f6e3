"""Every shipped recipe parses, binds, and takes two steps on tiny models; launchers launch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM

from llm_distill.cli import main
from llm_distill.recipe import Recipe, document
from tests import on_disk
from tests.launch import launch
from tests.teacher_server import TeacherServer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
MOST_LINES = 35

SMALL: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def name_of(path: Path) -> str:
    return path.name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_disk.fill(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[TeacherServer]:
    """The tiny teacher, as a recipe with a server asks for it."""
    network = AutoModelForCausalLM.from_pretrained(models / "teacher")
    with TeacherServer(network, on_disk.tokenizer(), most=64, longest=64) as running:
        yield running


def tiny_version(recipe: Path, models: Path, out: Path, url: str = "") -> dict[str, Any]:
    """A shipped recipe with tiny models and data in place of its own, nothing else changed."""
    content = document.read(recipe)
    data = {"path": str(models / "data.jsonl"), "eval": 0.25, "max_length": 32}
    student = content["student"]
    if isinstance(student, dict) and "FromTeacher" in student:  # of a teacher of four blocks
        student = {"FromTeacher": {**student["FromTeacher"], "depth": 2}}
    elif isinstance(student, dict):  # a named architecture stays what it is
        student = document.parse(
            "{FromConfig: {architecture: llama, config: {hidden_size: 32, intermediate_size: 64, "
            "num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8}}}",
            "student",
        )
    else:
        student = str(models / "student")
    return {
        **content,
        "student": student,
        "teacher": tiny_teacher(content["teacher"], models, out, url),
        "data": data,
        "training": {**content["training"], **SMALL, "output_dir": str(out)},
    }


def tiny_teacher(given: Any, models: Path, out: Path, url: str) -> Any:
    """A teacher of the same kind; one that is made of the student stays what it is."""
    path = str(models / "teacher")
    if isinstance(given, str) and "/" not in given:
        return given
    ((kind, settings),) = given.items() if isinstance(given, dict) else [("Local", {})]
    own: dict[str, dict[str, Any]] = {
        "Ensemble": {"members": [path] * len(settings.get("members", ()))},
        "Remote": {"url": url, "model": "teacher", "of": path},
        "Cached": {"path": str(out.with_name("cache")), "of": path},
    }
    if kind == "Local" and "quantize" in settings:
        return {kind: {**settings, "model": path}}
    return {kind: {**settings, **own[kind]}} if kind in own else path


def test_the_promised_recipes_are_there() -> None:
    kinds = {"cached.yaml", "ensemble.yaml", "itself.yaml", "remote.yaml", "sharded_teacher.yaml"}
    kinds |= {"quantised.yaml"}
    assert {"logits.yaml", "features.yaml", *kinds} <= {path.name for path in RECIPES}
    launchers = ["ddp", "device_map", "fsdp2", "hsdp", "single", "tp", "zero3"]
    assert [path.stem for path in LAUNCHERS] == launchers


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
class TestRecipes:
    def test_it_parses(self, recipe: Path) -> None:
        made = Recipe.load(recipe)
        assert made.objectives
        assert made.training["output_dir"].startswith(f"out/{recipe.stem}")

    def test_it_is_short_and_says_how_to_launch_it(self, recipe: Path) -> None:
        lines = recipe.read_text().splitlines()
        assert len(lines) <= MOST_LINES
        assert lines[0].startswith("# ")

    @pytest.mark.parametrize("command", ["check", "run"])
    def test_it_binds_and_takes_two_steps(
        self,
        recipe: Path,
        command: str,
        models: Path,
        server: TeacherServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
        small = tmp_path / recipe.name
        content = tiny_version(recipe, models, tmp_path / "out", server.url)
        small.write_text(document.dump(content))
        if "Cached" in content["teacher"]:
            assert main(["cache", str(small)]) == 0, capsys.readouterr().err
        assert main([command, str(small)]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        for entry in document.read(recipe)["objectives"]:
            assert (entry if isinstance(entry, str) else next(iter(entry))) in shown
        if command == "run":
            assert server.asked("/v1/completions") or recipe.stem != "remote"
        if command == "run" and "peft" not in document.read(recipe):
            weights = torch.nn.utils.parameters_to_vector(_parameters(tmp_path / "out"))
            assert weights.isfinite().all()


PLACES: dict[str, tuple[dict[str, Any], int, str]] = {
    "ddp": ({"shard": "fsdp2"}, 2, "on each of 2 processes (as asked)"),
    "hsdp": ({"shard": "hsdp", "shard_size": 2}, 4, "on each of 2 processes x 2 copies (as asked)"),
    "tp": ({"shard": "tp"}, 2, "on each of 2 processes (as asked)"),
    "device_map": ({"device_map": "auto", "shard": "auto"}, 1, "KL(teacher || student)"),
}
"""Launchers: what the recipe says beside them, processes here, what is told (of the pieces)."""


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", PLACES)
def test_a_large_teacher_by_its_launcher(launcher: str, models: Path, tmp_path: Path) -> None:
    """The sharded recipe through Accelerate's launcher, on gloo; what it tells of the pieces."""
    placed, processes, wanted = PLACES[launcher]
    recipe = ROOT / "recipes/sharded_teacher.yaml"
    content = tiny_version(recipe, models, tmp_path / "out")
    settings = document.read(recipe)["teacher"]["Local"]
    own = {"model": str(models / "teacher"), "dtype": "float32"}
    teacher = {**settings, **own, **placed}
    small = tmp_path / "sharded.yaml"
    small.write_text(document.dump({**content, "teacher": {"Local": teacher}}))
    config = tmp_path / "launcher.yaml"
    text = (ROOT / f"recipes/accelerate/{launcher}.yaml").read_text()
    here = {"use_cpu": "true", "num_processes": str(processes), "num_machines": "1"}
    for key, value in here.items():
        text, count = re.subn(rf"^{key}: \S+", f"{key}: {value}", text, flags=re.M)
        assert count == 1
    config.write_text(text)
    asked = ["--config_file", str(config), "--main_process_port", "0", "-m", "llm_distill", "run"]
    told = launch("accelerate.commands.launch", *asked, str(small))
    assert wanted in told
    weights = torch.nn.utils.parameters_to_vector(_parameters(tmp_path / "out"))
    assert weights.isfinite().all()


def _parameters(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).parameters()


class TestLaunchers:
    @pytest.mark.parametrize("config", LAUNCHERS, ids=name_of)
    def test_accelerate_reads_it_and_every_key_means_something(self, config: Path) -> None:
        loaded = load_config_from_file(str(config))
        for key, value in yaml.safe_load(config.read_text()).items():
            assert getattr(loaded, key) == value
        assert loaded.mixed_precision == "no"  # a recipe says so itself
        assert loaded.use_cpu is False

    @pytest.mark.parametrize(
        ("name", "kind", "processes"),
        [
            ("single", "NO", 1),
            ("ddp", "MULTI_GPU", 2),
            ("fsdp2", "FSDP", 2),
            ("hsdp", "MULTI_GPU", 16),
            ("tp", "MULTI_GPU", 8),
            ("device_map", "NO", 1),
            ("zero3", "DEEPSPEED", 2),
        ],
    )
    def test_what_it_launches(self, name: str, kind: str, processes: int) -> None:
        loaded = load_config_from_file(str(ROOT / f"recipes/accelerate/{name}.yaml"))
        assert loaded.distributed_type == kind
        assert loaded.num_processes == processes

    def test_the_launcher_takes_fsdp_version_2_with_whole_state_dicts(self) -> None:
        path = str(ROOT / "recipes/accelerate/fsdp2.yaml")
        given = ["--config_file", path, "-m", "llm_distill", "run", "x.yaml"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
        assert args.use_fsdp
        assert int(args.fsdp_version) == 2
        assert args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        assert args.fsdp_state_dict_type == "FULL_STATE_DICT"
        assert str(args.fsdp_reshard_after_forward).lower() == "true"
        # With it, transformers leaves the weights out on all ranks but the first, and nobody
        # would ever send the teacher's.
        assert str(args.fsdp_cpu_ram_efficient_loading).lower() == "false"
