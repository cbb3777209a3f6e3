"""Every shipped recipe parses, binds, and takes two steps on tiny models; launchers launch."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from llm_distill.cli import main
from llm_distill.recipe import Recipe, document
from tests import on_disk

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


def tiny_version(recipe: Path, models: Path, out: Path) -> dict[str, Any]:
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
        "teacher": tiny_teacher(content["teacher"], models),
        "data": data,
        "training": {**content["training"], **SMALL, "output_dir": str(out)},
    }


def tiny_teacher(given: Any, models: Path) -> Any:
    """A teacher of the same kind; one that is made of the student stays what it is."""
    path = str(models / "teacher")
    if isinstance(given, str) and "/" not in given:
        return given
    if isinstance(given, dict) and "Ensemble" in given:
        settings = given["Ensemble"]
        return {"Ensemble": {**settings, "members": [path] * len(settings["members"])}}
    return path


def test_the_promised_recipes_are_there() -> None:
    assert {"logits.yaml", "features.yaml", "ensemble.yaml", "itself.yaml"} <= {
        path.name for path in RECIPES
    }
    assert [path.name for path in LAUNCHERS] == ["ddp.yaml", "fsdp2.yaml", "single.yaml"]


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
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
        small = tmp_path / recipe.name
        small.write_text(document.dump(tiny_version(recipe, models, tmp_path / "out")))
        assert main([command, str(small)]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        for entry in document.read(recipe)["objectives"]:
            assert (entry if isinstance(entry, str) else next(iter(entry))) in shown
        if command == "run" and "peft" not in document.read(recipe):
            weights = torch.nn.utils.parameters_to_vector(_parameters(tmp_path / "out"))
            assert weights.isfinite().all()


def _parameters(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

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
        [("single", "NO", 1), ("ddp", "MULTI_GPU", 2), ("fsdp2", "FSDP", 2)],
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
