"""What quantising adds: measured once, kept, told, and asked of every quantised teacher alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    Local,
    Logits,
    Routed,
    added_kl,
    comparing,
    placement,
)
from llm_distill.added_kl import FILE, Added
from llm_distill.errors import InputError
from llm_distill.layers import uniform
from llm_distill.placement import Launch
from llm_distill.preparation import prepare_run
from llm_distill.teachers import local
from tests import racing, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.llama("teacher").save_pretrained(tmp_path / "teacher")
    tiny.sharpened(type(tiny.gpt2()), tiny.gpt2().config, seed=3).save_pretrained(tmp_path / "two")
    return tmp_path


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the teachers that are loaded whole."""
    found: list[str] = []
    hear = comparing.hear

    def watched(teacher: Any, *given: Any) -> Any:
        found.append(Path(teacher.name).name)
        return hear(teacher, *given)

    monkeypatch.setattr(comparing, "hear", watched)
    return found


def small(folder: Path, name: str = "teacher", **changes: Any) -> Local:
    given: dict[str, Any] = {"quantize": "bitsandbytes_8bit"} | changes
    return Local(str(folder / name), **given)


def trainer(folder: Path, teacher: Any, *objectives: Any, **changes: Any) -> DistillTrainer:
    given: dict[str, Any] = {"train_dataset": tiny.rows()} | changes
    args = given.pop("args", None) or tiny.arguments(folder / "out")
    return DistillTrainer(tiny.llama("student"), teacher, objectives or None, args, **given)


def told(made: DistillTrainer) -> list[str]:
    return [line for line in made.run.told if "adds" in line]


class TestMeasured:
    def test_once_and_kept_beside_the_run(self, folder: Path, heard: list[str]) -> None:
        first = told(trainer(folder, small(folder)))
        assert heard == ["teacher"]
        assert len(first) == 1
        assert "bitsandbytes_8bit adds a KL of 0.000" in first[0]
        assert told(trainer(folder, small(folder))) == first
        assert heard == ["teacher"]
        kept = json.loads((folder / "out" / FILE).read_text())["added"][0]
        assert 1e-5 < kept["kl"] < 1e-2
        assert 0.9 < kept["agreement"] <= 1
        rows = [tiny.rows()[k] for k in range(added_kl.SEQUENCES)]
        supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
        assert kept["tokens"] == supervised

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: {"teacher": small(folder, quantize="torchao_int8")},
            lambda folder: {"train_dataset": tiny.rows(32, empty=(1,))},
        ],
    )
    def test_anew_for_another_way_or_text(
        self, folder: Path, heard: list[str], change: Callable[[Path], dict[str, Any]]
    ) -> None:
        trainer(folder, small(folder))
        given = {"teacher": small(folder)} | change(folder)
        trainer(folder, given.pop("teacher"), **given)
        assert heard == ["teacher", "teacher"]

    def test_anew_for_other_weights(self, folder: Path, heard: list[str]) -> None:
        trainer(folder, small(folder))
        tiny.llama("teacher", tied=True).save_pretrained(folder / "teacher")
        trainer(folder, small(folder))
        assert len(heard) == 2

    @pytest.mark.parametrize("broken", ["", "{", '{"key": 1}', "[]"])
    def test_what_is_no_file_of_it_is_measured_anew(
        self, folder: Path, heard: list[str], broken: str
    ) -> None:
        (folder / "out").mkdir()
        (folder / "out" / FILE).write_text(broken)
        trainer(folder, small(folder))
        assert heard == ["teacher"]

    def test_sequences_are_cut_short(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(added_kl, "LENGTH", 6)
        args = tiny.arguments(folder / "out")
        given = {"train_dataset": tiny.rows()}
        run = prepare_run(tiny.llama("student"), small(folder), [Logits()], args, given)
        found = [batch.inputs["input_ids"].shape for batch in added_kl._batches(run, args)]
        assert found == [(8, 6), (8, 6)]

    def test_a_resumed_training_measures_nothing(self, folder: Path, heard: list[str]) -> None:
        args = tiny.arguments(folder / "out", save_strategy="steps", save_steps=2)
        made = trainer(folder, small(folder), args=args)
        made.train()
        weights = {k: v.clone() for k, v in made.student.state_dict().items()}
        again = trainer(folder, small(folder), args=args)
        again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
        assert heard == ["teacher"]
        for name, value in again.student.state_dict().items():
            assert torch.equal(value, weights[name]), name


class TestNotMeasured:
    @pytest.mark.parametrize(
        ("changes", "objectives"),
        [
            ({"measure_quantize": False}, [Logits()]),
            # Nobody reads its logits; its head is not even loaded.
            ({}, [CrossEntropy(), HiddenStates(layers=uniform, init="random", gate=False)]),
        ],
    )
    def test_where_it_is_not_wanted(
        self, folder: Path, heard: list[str], changes: dict[str, Any], objectives: list[Any]
    ) -> None:
        made = trainer(folder, small(folder, **changes), *objectives)
        name = str(folder / "teacher")
        assert told(made) == [f"teacher {name}: bitsandbytes_8bit, what that adds was not measured"]
        assert heard == []
        made.train()

    def test_data_that_are_read_once(self, folder: Path, heard: list[str]) -> None:
        class Once(torch.utils.data.IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter(tiny.rows())

        made = trainer(folder, small(folder), Logits(), train_dataset=Once())
        assert "was not measured" in told(made)[0]
        assert heard == []

    def test_a_teacher_with_all_its_bits(self, folder: Path, heard: list[str]) -> None:
        made = trainer(folder, str(folder / "teacher"))
        assert (told(made), made.quantised, heard) == ([], (), [])
        assert not (folder / "out" / FILE).exists()


class TestSeveral:
    def test_each_quantised_member_of_an_ensemble(self, folder: Path, heard: list[str]) -> None:
        eight = small(folder, "two")
        four = small(folder, quantize="bitsandbytes_4bit")
        both = Ensemble([four, str(folder / "teacher"), Ensemble([eight, four])])
        made = trainer(folder, both, Logits(), HiddenStates(member=0, layers=uniform))
        assert heard == ["teacher", "two", "teacher"]
        words = [line.split(": ")[1].split()[0] for line in told(made)]
        assert words == ["bitsandbytes_4bit", "bitsandbytes_8bit", "bitsandbytes_4bit"]
        figures = [line.split("KL of ")[1] for line in told(made)]
        assert figures[0] == figures[2] != figures[1]
        made.train()
        alone = trainer(folder / "alone", four)
        assert told(alone)[0] == told(made)[0]

    def test_experts(self, folder: Path, heard: list[str]) -> None:
        experts = {"a": small(folder), "b": small(folder, "two", measure_quantize=False)}
        rows = [dict(row, domain="ab"[k % 2]) for k, row in enumerate(tiny.rows())]
        made = trainer(folder, Routed(experts, by="domain"), train_dataset=rows)
        assert heard == ["teacher"]
        assert ["not measured" in line for line in told(made)] == [False, True]
        made.train()

    def test_members_that_take_turns(self, folder: Path) -> None:
        both = Ensemble([small(folder), str(folder / "two")], turns=True)
        with pytest.raises(InputError, match="is quantised, and such weights stay on the device"):
            trainer(folder, both)


def test_a_race_measures_it_once(folder: Path, heard: list[str]) -> None:
    """Its trainings are given the teacher at work."""
    made = racing.trainer(folder / "out", teacher=small(folder))
    assert heard == ["teacher"]
    assert len(told(made)) == 1


def test_all_signals_beside_it(folder: Path) -> None:
    """Opened for attention as well, it is asked with query rows."""
    made = trainer(folder, small(folder), Logits(), AttentionMaps(queries=4), HiddenStates())
    assert "adds a KL" in told(made)[0]


def test_streams(folder: Path) -> None:
    stream = datasets.Dataset.from_list(list(tiny.rows())).to_iterable_dataset()
    assert "adds a KL" in told(trainer(folder, small(folder), train_dataset=stream))[0]


def test_the_card_tells_it(folder: Path) -> None:
    made = trainer(folder, small(folder, quantize="bitsandbytes_4bit"))
    facts = made.card_facts()
    assert facts.teacher.parameters == tiny.llama("teacher").num_parameters()
    made.create_model_card()
    card = (folder / "out" / "README.md").read_text()
    assert "| Quantised | teacher teacher: bitsandbytes_4bit adds a KL of 0.0" in card
    assert str(folder) not in card


def test_a_checkpoint_that_has_no_room_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "launched", lambda device: Launch(world=2, local=2, free=500_000))
    facts = placement.facts_of
    monkeypatch.setattr(local, "facts_of", lambda *a, **k: replace(facts(*a, **k), blocks=None))
    with pytest.raises(InputError, match=r"loaded once as it is, and teacher .* takes 0\.\d MB"):
        trainer(folder, small(folder))
    with pytest.raises(InputError, match="pieces; write measure_quantize: false"):
        trainer(folder, small(folder))
    assert "not measured" in told(trainer(folder, small(folder, measure_quantize=False)))[0]


def test_in_words() -> None:
    assert str(Added("m", "torchao_int8", 0.25, 0.5, 1000)) == (
        "teacher m: torchao_int8 adds a KL of 0.25 nats per token, agreement 50.0 % (1,000 tokens)"
    )
