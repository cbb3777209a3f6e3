"""Passages of text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scripts.bench.mapping.settings import Settings
from scripts.bench.mapping.texts import HIDDEN, MASK, Texts, collate, example

if TYPE_CHECKING:
    from pathlib import Path

SMALL = replace(Settings(), length=16, held_out=5)


def test_the_end_of_a_file_is_held_out(text: Path) -> None:
    texts = Texts.read(text)
    whole = text.read_bytes()
    assert texts.train + texts.held_out == whole
    assert len(texts.held_out) == len(whole) // 10


def test_passages_cover_the_training_text_once(text: Path) -> None:
    texts = Texts.read(text)
    passages = texts.training(SMALL, masked=False)
    assert len(passages) == len(texts.train) // 16
    assert passages == texts.training(SMALL, masked=False)
    assert sorted(b for p in passages for b in p["input_ids"]) == sorted(
        texts.train[: 16 * len(passages)]
    )
    assert len(texts.held(SMALL, masked=False)) == 5


def test_masks_are_those_of_the_passage() -> None:
    made = example(bytes(range(64)), 0, 64, masked=True)
    hidden = [k for k, token in enumerate(made["input_ids"]) if token == MASK]
    assert len(hidden) == int(HIDDEN * 64)
    assert [made["labels"][k] for k in hidden] == hidden
    assert sum(label != -100 for label in made["labels"]) == len(hidden)
    assert made == example(bytes(range(64)), 0, 64, masked=True)
    assert collate([made, made])["input_ids"].shape == (2, 64)


def test_other_text_has_another_digest() -> None:
    assert Texts(b"a", b"b").digest != Texts(b"a", b"c").digest
