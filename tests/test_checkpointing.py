"""Checkpoints resume bit-exact and students are saved plain, on every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_distill import DistillTrainer
from tests import tiny
from tests.exactness_worker import objectives, whole
from tests.launch import launch
from tests.resume_worker import STUDENTS, build

ENGINES = {"one": 1, "ddp": 2, "fsdp2_full": 2, "fsdp2_sharded": 2}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=ENGINES)
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """One engine's runs: its name, their folder, their weights."""
    folder = tmp_path_factory.mktemp("resume")
    launch("tests.resume_worker", request.param, str(folder), ranks=ENGINES[request.param])
    facts = torch.load(folder / f"{request.param}.pt", weights_only=True)
    return request.param, folder / request.param, facts


@pytest.mark.parametrize("kind", STUDENTS)
def test_resumed_equals_straight(run: Any, kind: str) -> None:
    _, _, facts = run
    straight, resumed = facts[kind]["straight"], facts[kind]["resumed"]
    assert straight.keys() == resumed.keys()
    assert any(name.startswith("terms.") for name in straight)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_saved_student_is_plain(run: Any, kind: str) -> None:
    """`from_pretrained` reports nothing, and the weights are those of the run."""
    _, folder, facts = run
    loading: Any = AutoModelForCausalLM.from_pretrained
    model, report = loading(folder / kind / "final", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, facts[kind]["resumed"][f"student.{name}"]), name
    files = {path.name for path in (folder / kind / "final").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}


def test_saved_adapter_loads(run: Any) -> None:
    _, folder, facts = run
    model = PeftModel.from_pretrained(tiny.llama("student"), folder / "lora" / "final")
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(value, facts["lora"]["resumed"][f"student.{name}"]), name
    assert {p.name for p in (folder / "lora" / "final").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_best_checkpoint_is_loaded_at_the_end(run: Any) -> None:
    """On every engine: the weights that are left score what the best evaluation scored."""
    scores, loaded = run[2]["best"]["scores"], run[2]["best"]["loaded"]
    assert min(scores) < scores[-1], "the learning rate is too small to make a later step worse"
    assert loaded == pytest.approx(min(scores), rel=1e-5)


@pytest.mark.parametrize("kind", STUDENTS)
def test_no_pickled_arguments(run: Any, kind: str) -> None:
    """They would carry the Hub token in clear."""
    engine, folder, facts = run
    assert "training_args.bin" not in facts[kind]["files"]
    assert not list((folder / kind).rglob("training_args.bin"))
    assert "terms.safetensors" in facts[kind]["files"]
    terms = load_file(folder / kind / "checkpoint-2" / "terms.safetensors")
    assert bool(terms) == (engine != "fsdp2_sharded")


def test_projectors_of_another_map_are_refused(run: Any) -> None:
    """Sharded ones too, which fit by their shapes."""
    assert "with other layer maps" in run[2]["other"]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])])
def test_best_model_is_loaded(adapter: LoraConfig | None, tmp_path: Path) -> None:
    """By KL to the teacher unless told otherwise, weights and projectors of that checkpoint."""
    args = tiny.arguments(
        tmp_path,
        max_steps=6,
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        objectives(),
        args,
        train_dataset=tiny.rows(),
        eval_dataset=tiny.rows(8),
        peft_config=adapter,
    )
    trainer.train()
    scores = {log["step"]: log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log}
    best = min(scores, key=lambda step: scores[step])
    assert args.metric_for_best_model == "eval_kl"
    assert best < 6, "the learning rate is too small to make a later step worse"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    again = trainer.evaluate()["eval_kl"]
    assert again == pytest.approx(scores[best], rel=1e-6)
    folder = tmp_path / f"checkpoint-{best}"
    terms = load_file(folder / "terms.safetensors")
    assert terms.keys() == trainer.distiller.terms.state_dict().keys()
    assert all(torch.equal(terms[k], v) for k, v in trainer.distiller.terms.state_dict().items())
    if adapter is None:
        saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(saved[k], v) for k, v in trainer.student.state_dict().items())


def test_lost_projectors_are_not_forgotten(tmp_path: Path) -> None:
    build("plain", tmp_path, 1).train()
    (tmp_path / "checkpoint-2" / "terms.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="projectors and maps of this run would start anew"):
        build("plain", tmp_path, 1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_lost_weights_are_refused(tmp_path: Path) -> None:
    """transformers alone would go on with random ones, after a line in the log."""
    from safetensors.torch import load_file, save_file

    build("plain", tmp_path, 1).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit the student.*model\.norm\.weight"):
        build("plain", tmp_path, 1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_saved_config_is_the_students(tmp_path: Path) -> None:
    """Dropout, cache and attention as before; the generation config beside it."""
    student = tiny.llama("student")
    student.config.attention_dropout = 0.25
    student.generation_config.max_new_tokens = 7
    before = student.config.to_dict()
    trainer = DistillTrainer(
        student,
        tiny.llama("teacher"),
        objectives(),
        tiny.arguments(tmp_path, activation_checkpointing=True),
        train_dataset=tiny.rows(),
    )
    trainer.train()
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    after = saved.config.to_dict()
    assert after["attention_dropout"] == 0.25
    assert after["use_cache"] is True
    assert saved.generation_config.max_new_tokens == 7
    changed = {k for k in before if before[k] != after.get(k)} - {"_name_or_path", "dtype"}
    assert changed <= {"architectures", "transformers_version"}
    assert whole(trainer).keys()


def test_streams_resume_where_they_were(tmp_path: Path) -> None:
    """The rows that were trained on are skipped, queries and epochs included."""

    def run(folder: Path, **resume: Any) -> dict[str, torch.Tensor]:
        args = tiny.arguments(
            folder,
            max_steps=6,
            optim="adamw_torch",
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=3,
        )
        trainer = DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            objectives(),
            args,
            train_dataset=tiny.rows(40).to_iterable_dataset(),
        )
        trainer.train(**resume)
        assert trainer.state.global_step == 6
        return whole(trainer)

    straight = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
