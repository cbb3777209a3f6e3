from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from scripts._quickstart import teacher
from scripts._quickstart.corpus import Corpus
from scripts._quickstart.settings import Settings
from scripts._quickstart.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXT = Corpus("Some text to train on is here.\n" * 50, "Some other text.\n")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(output=tmp_path / "out", seed=0, steps=1, teacher_steps=1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The trainings that were asked for, none of which takes place."""
    calls: list[Settings] = []

    def train(corpus: Corpus, settings: Settings) -> None:
        del corpus
        settings.teacher.mkdir(parents=True, exist_ok=True)
        calls.append(settings)

    monkeypatch.setattr(teacher, "train", train)
    return calls


def test_a_teacher_with_the_same_settings_is_used_again(
    settings: Settings, trained: list[Settings]
) -> None:
    assert not teacher.find_or_train(TEXT, settings)
    assert teacher.find_or_train(TEXT, settings)
    assert teacher.find_or_train(TEXT, replace(settings, steps=99))
    assert trained == [settings]


@pytest.mark.parametrize("change", [{"seed": 1}, {"teacher_steps": 2}])
def test_other_settings_train_anew(
    settings: Settings, trained: list[Settings], change: dict[str, int]
) -> None:
    teacher.find_or_train(TEXT, settings)
    other = replace(settings, **change)  # type: ignore[arg-type]
    assert not teacher.find_or_train(TEXT, other)
    assert trained == [settings, other]


def test_another_text_trains_anew(settings: Settings, trained: list[Settings]) -> None:
    teacher.find_or_train(TEXT, settings)
    assert not teacher.find_or_train(replace(TEXT, train="Another text.\n"), settings)
    assert len(trained) == 2


def test_another_architecture_trains_anew(
    settings: Settings, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.find_or_train(TEXT, settings)
    monkeypatch.setitem(teacher.ARCHITECTURE, "hidden_size", 96)
    assert not teacher.find_or_train(TEXT, settings)
    assert len(trained) == 2


def test_a_teacher_whose_training_was_killed_is_not_used(
    settings: Settings, trained: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.find_or_train(TEXT, settings)

    def killed(corpus: Corpus, settings: Settings) -> None:
        raise KeyboardInterrupt

    other = replace(settings, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            teacher.find_or_train(TEXT, other)
    assert not teacher.find_or_train(TEXT, settings)
    assert len(trained) == 2


def test_a_broken_manifest_trains_anew(settings: Settings, trained: list[Settings]) -> None:
    teacher.find_or_train(TEXT, settings)
    (settings.teacher / "manifest.json").write_text("{half of")
    assert not teacher.find_or_train(TEXT, settings)
    manifest = json.loads((settings.teacher / "manifest.json").read_text())
    assert manifest["steps"] == 1
    assert len(trained) == 2


def test_the_seed_gives_the_weights() -> None:
    tokenizer = train_tokenizer(TEXT.train, 300)
    first, again, other = (
        parameters_to_vector(teacher.build(tokenizer, seed).parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_has_six_layers_and_the_tokens_of_its_tokenizer() -> None:
    tokenizer = train_tokenizer(TEXT.train, 300)
    config = teacher.build(tokenizer, 0).config
    assert (config.num_hidden_layers, config.hidden_size) == (6, 192)
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (1, 0)
