"""What reaches the Hub, through the real client: a plain student, its tokenizer, its card."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard

from llm_distill import CrossEntropy, DistillTrainer, FromConfig, FromTeacher, HiddenStates, Logits
from llm_distill.card import DataFacts
from llm_distill.layers import uniform
from llm_distill.publishing import (
    data_facts,
    layer_maps,
    model_facts,
    name_of,
    objective_facts,
    snapshot,
    versions,
)
from llm_distill.signals import ModelSpec
from tests import tiny
from tests.hub_server import TOKEN, LocalHub, hub, run_with_hub, xet_hub

__all__ = ["hub", "xet_hub"]

PLAIN = {
    ".gitattributes",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.mark.parametrize("server", ["hub", "xet_hub"])
def test_pushed_student_loads_by_its_id(server: str, request: Any, tmp_path: Path) -> None:
    local: LocalHub = request.getfixturevalue(server)
    done = run_with_hub(["-m", "tests.push_worker", str(tmp_path), "end", "plain"], local, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(local.files("me/student")) == PLAIN
    card = ModelCard(local.text("me/student", "README.md"))
    assert card.data.to_dict()["tags"]
    text = card.content
    for part in ("LlamaForCausalLM", "HiddenStates", "AttentionMaps", "forward_kl", "KL"):
        assert part in text
    assert "on `a dataset made in Python` (32 examples)" in text
    assert "| transformers | " in text
    assert str(tmp_path) not in text


def test_pushes_from_checkpoints_are_plain_too(hub: LocalHub, tmp_path: Path) -> None:
    """No projectors, no optimizer, no pickled arguments, at no commit; no token anywhere."""
    command = ["-m", "tests.push_worker", str(tmp_path), "every_save", "plain"]
    done = run_with_hub(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(hub.files("me/student")) == PLAIN
    assert len(hub.asked("POST", "/commit/")) >= 2
    local = [path for path in (tmp_path / "student").rglob("*") if path.is_file()]
    assert not [path for path in local if path.name == "training_args.bin"]
    assert not list((tmp_path / "student").glob("_push-*"))
    assert not [path for path in local if TOKEN.encode() in path.read_bytes()]


def test_adapter_is_pushed_as_one(hub: LocalHub, tmp_path: Path) -> None:
    done = run_with_hub(["-m", "tests.push_worker", str(tmp_path), "end", "lora"], hub, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    files = set(hub.files("me/student"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert "model.safetensors" not in files
    assert "terms.safetensors" not in files


def test_failed_background_push_is_said(hub: LocalHub, tmp_path: Path) -> None:
    """The run goes on, the student is whole here, and the last push still happens."""
    hub.fail("POST", "/commit/", 500, times=1)
    command = ["-m", "tests.push_worker", str(tmp_path), "every_save", "plain"]
    done = run_with_hub(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "A push to me/student failed" in done.stderr
    assert set(hub.files("me/student")) == PLAIN


def test_facts_of_models(student: Any) -> None:
    spec = ModelSpec.of(student.config, "LlamaForCausalLM")
    random = model_facts(FromConfig("llama"), spec, student)
    assert (random.name, random.origin) == ("llama", "random")
    assert random.parameters == sum(p.numel() for p in student.parameters())
    from llm_distill import Local

    named = ModelSpec.of(student.config, "Qwen/Qwen3-0.6B")
    assert model_facts(Local(student), named, None).origin == "hub"

    cut = model_facts(FromTeacher(depth=2), replace(named, blocks=(1, 4)), None)
    assert (cut.name, cut.origin) == ("blocks 1, 4", "cut")


def test_facts_of_objectives() -> None:
    rows = objective_facts([CrossEntropy(weight=0.1), Logits(temperature=2.0)])
    assert [tuple(row) for row in rows] == [
        ("CrossEntropy", "0.1", ""),
        ("Logits", "1", "forward_kl, temperature 2, scaling T2"),
    ]


def test_layer_maps_are_told_where_there_are_any(student: Any, teacher: Any) -> None:
    from llm_distill.binding import bind

    specs = ModelSpec.of(student.config, "a"), ModelSpec.of(teacher.config, "b")
    assert layer_maps(bind([Logits()], *specs, seed=0)) is None
    text = layer_maps(bind([HiddenStates(layers=uniform)], *specs, seed=0))
    assert text is not None
    assert "HiddenStates\nstudent layer | teacher layer   uniform" in text


def test_a_dataset_says_what_it_knows_of_itself(tmp_path: Path) -> None:
    assert data_facts(tiny.rows(3)) == DataFacts(
        name="a dataset made in Python", origin="local", part="3 examples"
    )
    named = datasets.Dataset.from_dict(
        {"a": [1] * 1200}, info=datasets.DatasetInfo(dataset_name="stories"), split="train"
    )
    assert data_facts(named) == DataFacts(
        name="stories", origin="local", part="split train, 1,200 examples"
    )
    stream = tiny.rows(3).to_iterable_dataset()
    assert data_facts(stream) == DataFacts(name="a dataset made in Python", origin="local")
    assert data_facts([{"input_ids": [1]}]) is data_facts(None) is None


def test_the_card_of_a_run_in_python_names_the_data(tmp_path: Path) -> None:
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.rows(3),
        eval_dataset=tiny.rows(2),
    )
    facts = trainer.card_facts()
    assert facts.data is not None
    assert facts.data.part == "3 examples"
    assert facts.evaluation_data is not None
    assert facts.evaluation_data.part == "2 examples"
    told = DataFacts(name="me/data", origin="hub", part="split train")
    trainer.data = trainer.evaluation_data = told
    assert trainer.card_facts().data is trainer.card_facts().evaluation_data is told


def test_names_and_versions(tmp_path: Path) -> None:
    assert name_of(tiny.arguments(tmp_path / "mine")) == "mine"
    assert name_of(tiny.arguments(tmp_path, hub_model_id="me/it")) == "me/it"
    assert {"python", "torch", "transformers", "llm-distill"} <= versions().keys()


def test_the_card_tells_of_the_weights_there_are(tmp_path: Path) -> None:
    """The best checkpoint's figures once it is loaded, and those of a later evaluation after."""
    changes: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        [Logits()],
        tiny.arguments(
            tmp_path, max_steps=2, learning_rate=100.0, load_best_model_at_end=True, **changes
        ),
        train_dataset=tiny.rows(),
        eval_dataset=tiny.rows(9),
    )
    trainer.train()
    assert trainer.state.best_global_step == 1  # this learning rate makes it worse
    facts = trainer.card_facts()
    first = next(log for log in trainer.state.log_history if "eval_kl" in log)
    assert facts.steps == 1
    assert facts.evaluation["eval_kl"] == first["eval_kl"]
    later = trainer.evaluate(tiny.rows(4))
    assert trainer.card_facts().evaluation["eval_kl"] == later["eval_kl"]


def test_the_card_tells_of_the_first_of_several_datasets(tmp_path: Path) -> None:
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        [Logits()],
        tiny.arguments(tmp_path),
        train_dataset=tiny.rows(),
        eval_dataset={"near": tiny.rows(9), "far": tiny.rows(4)},
    )
    metrics = trainer.evaluate()
    facts = trainer.card_facts()
    assert facts.evaluation["eval_kl"] == metrics["eval_near_kl"]
    assert facts.evaluation["eval_loss/Logits"] == metrics["eval_near_loss/Logits"]
    assert facts.evaluation_data is not None
    assert facts.evaluation_data.part == "`near`, the first of 2: 9 examples"


def test_snapshots_outlive_their_checkpoint(tmp_path: Path) -> None:
    """`save_total_limit` may delete a checkpoint that is still being uploaded."""
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "additional_chat_templates").mkdir(parents=True)
    for name in ("model.safetensors", "additional_chat_templates/a.jinja", "optimizer.pt"):
        (checkpoint / name).write_text(name)
    copy = snapshot(checkpoint, tmp_path)
    shutil.rmtree(checkpoint)
    files = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
    assert files == ["additional_chat_templates/a.jinja", "model.safetensors"]
    assert (copy / "model.safetensors").read_text() == "model.safetensors"
