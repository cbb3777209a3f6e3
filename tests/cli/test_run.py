import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
)

from llm_distill.cli.run import _described
from llm_distill.data import Data
from llm_distill.race import Arm
from llm_distill.race.heats import Heats
from llm_distill.recipe import Recipe, document
from llm_distill.trainer import DistillTrainer
from tests import on_disk
from tests.cli.conftest import Cli
from tests.hub_server import LocalHub, hub, run_with_hub

__all__ = ["hub"]

ROOT = Path(__file__).parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_a_run_leaves_a_plain_student_its_recipe_and_figures(cli: Cli, tmp_path: Path) -> None:
    ended = cli("run", "--training.max_steps", "3")
    out = tmp_path / "out"
    assert ended.code == 0, ended.err
    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    assert model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(out)) == len(on_disk.tokenizer())
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3
    figures = json.loads((out / "eval_results.json").read_text())
    assert figures["eval_kl"] > 0
    assert Recipe.load(out / "recipe.yaml").training["max_steps"] == 3
    assert json.loads((out / "versions.json").read_text())["torch"] == torch.__version__
    assert "split train" in (out / "README.md").read_text()
    assert "Data: 16 examples: 0 truncated" in ended.out
    assert ended.out.count("forward_kl") == 1
    assert "forward_kl" not in ended.err
    assert "KL(teacher || student), nats per token" in ended.out
    assert f"The student is in {out}" in ended.out


def test_the_resolved_recipe_gives_the_same_student(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "--objectives.1.Logits.temperature", "2.0", "--training.seed", "5").code == 0
    again = tmp_path / "again"
    resolved = document.read(tmp_path / "out" / "recipe.yaml")
    ended = cli("run", "--training.output_dir", str(again), **resolved)
    assert ended.code == 0, ended.err
    first, second = weights(tmp_path / "out"), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_resumed_to_the_same_weights(cli: Cli, tmp_path: Path) -> None:
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    steps = ("--training.max_steps", "4", "--training.save_strategy", "steps")
    features = ("--objectives.0", "HiddenStates")
    assert cli("run", *steps, *features, "--training.output_dir", whole).code == 0
    saved = ("--training.save_steps", "2", "--training.output_dir", cut)
    assert cli("run", *steps, *saved, *features).code == 0
    for left in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "cut" / left
        path.rename(tmp_path / left)
    assert cli("run", *steps, *saved, *features).code == 2
    ended = cli("run", *steps, *saved, *features, "--resume")
    assert ended.code == 0, ended.err
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_full_folder_is_refused_unless_overwritten(cli: Cli, tmp_path: Path) -> None:
    old = tmp_path / "out" / "checkpoint-900"
    old.mkdir(parents=True)
    ended = cli("run")
    assert ended.code == 2
    assert "is not empty; go on with --resume, start anew with --overwrite" in ended.err
    assert old.exists()
    ended = cli("run", "--overwrite")
    assert ended.code == 0, ended.err
    assert not old.exists()


def test_an_adapter(cli: Cli, tmp_path: Path) -> None:
    ended = cli("run", "--peft.r", "2", "--peft.target_modules", "all-linear")
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["task_type"]) == (2, "CAUSAL_LM")


def test_a_moving_target_chunk_by_chunk(cli: Cli, tmp_path: Path) -> None:
    moving = "Logits: {loss: {jsd: {beta: 0.3}}, target: {Taid: {start: 0.2}}}"
    ended = cli("run", "--objectives.1", moving, "--rows_per_chunk", "5")
    assert ended.code == 0, ended.err
    assert "jsd(beta=0.3), target Taid from 0.2 to 1" in ended.out
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    shares = [log["target/Logits"] for log in logs if "loss" in log]
    assert shares == [pytest.approx(0.6), pytest.approx(1.0)]
    assert all({"kl", "agreement", "entropy"} <= log.keys() for log in logs if "loss" in log)
    assert "eval_entropy" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").rows_per_chunk == 5
    assert "arXiv:2501.16937" in (tmp_path / "out" / "README.md").read_text()


def test_a_balance(cli: Cli, tmp_path: Path) -> None:
    ended = cli("run", "--balance", "normalised")
    assert ended.code == 0, ended.err
    assert "Balance: normalised: each term over its running mean, momentum 0.99" in ended.out
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    (first, *_) = [log for log in state["log_history"] if "loss" in log]
    for name in ("CrossEntropy", "Logits"):
        assert first[f"weight/{name}"] > 0
    assert "balance: normalised" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_chunks_are_as_the_recipe_says(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []
    train = DistillTrainer.train

    def noting(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.distiller.rows_per_chunk)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "train", noting)
    assert cli("run", rows_per_chunk=7).code == 0
    assert cli("run", "--overwrite").code == 0
    assert seen == [7, None]


def lost(models: Path, folder: Path) -> Path:
    """A teacher that says NaN of one token, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models / "teacher").save_pretrained(folder)
    return folder


def test_a_loss_that_is_no_number_is_said_without_a_traceback(
    cli: Cli, models: Path, tmp_path: Path
) -> None:
    """The checkpoint before the log stays whole; no student is written."""
    steps = ("--training.max_steps", "4", "--training.logging_steps", "3")
    saved = ("--training.save_strategy", "steps", "--training.save_steps", "2")
    ended = cli("run", *steps, *saved, "--teacher", str(lost(models, tmp_path / "lost")))
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("llm-distill: ")
    assert "rows had a loss that is no number" in ended.err
    assert "The first: Logits at step 1 on rank 0, sequence 0 of its" in ended.err
    assert "Traceback" not in ended.err
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in weights(out / "checkpoint-2").values())


@pytest.mark.distributed
def test_two_processes_fail_together_and_one_speaks(
    content: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    content["teacher"] = str(lost(models, tmp_path / "lost"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump(content))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*run, "-m", "llm_distill", "run", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("llm-distill: ") == 1
    assert "rows had a loss that is no number" in done.stderr
    assert "FloatingPointError" not in done.stderr


def test_a_race_that_no_hint_wins_is_told(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(heats: Heats, arm: Arm, steps: int) -> float:
        return 0.25 if arm.mapping is None else 0.5

    monkeypatch.setattr(Heats, "measure", measure)
    race = {
        "HiddenStates": {"layers": {"auto_race": {"share": 0.99, "weights": [1], "shortest": 5}}}
    }
    data = {"path": str(on_disk.save_data(tmp_path / "more.jsonl", rows=40)), "max_length": 32}
    ended = cli("run", "--training.max_steps", "120", objectives=["Logits", race], data=data)
    assert ended.code == 0, ended.err
    assert "none <- taken" in ended.out
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert "loss/Logits" in logs[0]
    assert "loss/HiddenStates" not in logs[0]


def test_a_stream_is_counted(cli: Cli) -> None:
    ended = cli("run", "--data.streaming", "true", "--data.eval", "null")
    assert ended.code == 0, ended.err
    assert "Data that was read: " in ended.out


def test_a_random_student(cli: Cli, tmp_path: Path) -> None:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
    student = {"FromConfig": {"architecture": "llama", "config": config}}
    ended = cli("run", student=student, objectives=["Logits", "HiddenStates", "AttentionMaps"])
    assert ended.code == 0, ended.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16


def test_a_teacher_that_cannot_give_a_signal(cli: Cli, tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=on_disk.VOCABULARY, hidden_size=16, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    on_disk.tokenizer().save_pretrained(tmp_path / "bloom")
    ended = cli("run", "--teacher", str(tmp_path / "bloom"), "--objectives.0", "AttentionMaps")
    assert ended.code == 2
    assert "(bloom) has no attention that can be read" in ended.err


def test_a_failure_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("the disk is on fire")

    monkeypatch.setattr(DistillTrainer, "train", fail)
    with pytest.raises(ValueError, match="the disk is on fire"):
        cli("run")


def test_a_push_happens_once_and_after_saving(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[list[str]] = []

    def push(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> None:
        pushed.append(sorted(p.name for p in Path(str(trainer.args.output_dir)).iterdir()))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr(DistillTrainer, "init_hf_repo", lambda trainer, *a, **k: None)
    monkeypatch.setattr(DistillTrainer, "push_to_hub", push)
    ended = cli("run", "--training.push_to_hub", "true", "--training.hub_model_id", "me/student")
    assert ended.code == 0, ended.err
    assert len(pushed) == 1
    assert {"model.safetensors", "recipe.yaml", "tokenizer.json"} <= set(pushed[0])


def test_a_recipe_that_pushes_gives_a_student_to_be_loaded_by_its_id(
    hub: LocalHub, content: dict[str, Any], tmp_path: Path
) -> None:
    content["training"] |= {"push_to_hub": True, "hub_model_id": "me/student"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump(content))
    program = (
        "import sys\n"
        "from llm_distill.cli import main\n"
        f"assert main(['run', {str(recipe)!r}]) == 0\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained('me/student')\n"
    )
    done = run_with_hub(program, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    pushed = set(hub.files("me/student"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= pushed
    assert not {"recipe.yaml", "versions.json", "training_args.bin"} & pushed
    assert str(tmp_path) not in hub.text("me/student", "README.md")


@pytest.mark.distributed
def test_two_processes_train_together_and_one_speaks(
    content: dict[str, Any], tmp_path: Path
) -> None:
    launched = tmp_path / "ddp.yaml"
    shipped = (ROOT / "recipes/accelerate/ddp.yaml").read_text()
    launched.write_text(shipped.replace("use_cpu: false", "use_cpu: true"))
    assert load_config_from_file(str(launched)).use_cpu
    # One epoch of 12 examples, 2 at a time: 6 steps on one process, 3 on two.
    content["training"] |= {
        "per_device_train_batch_size": 2,
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump(content))
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(launched),
    ]
    command = [*accelerate, "--main_process_port", "0", "-m", "llm_distill", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert done.stdout.count("The student is in") == 1
    assert done.stdout.count("Data: 16 examples") == 1
    assert weights(tmp_path / "out")
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode != 0
    assert again.stderr.count("is not empty; go on with --resume") == 1


@pytest.mark.parametrize(
    ("held", "name", "part"),
    [
        (0.05, "me/data", "5.0% of split train, held out"),
        ("test", "me/data", "split test"),
        ("./held.jsonl", "./held.jsonl", None),
    ],
)
def test_card_tells_the_evaluation_data(held: str | float, name: str, part: str | None) -> None:
    _, facts = _described(Data(path="me/data", eval=held))
    assert facts is not None
    assert (facts.name, facts.part) == (name, part)
    assert _described(Data(path="me/data"))[1] is None
