"""Shards follow from the data: every example once, in order, whatever the ranks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llm_distill import HiddenStates, Local
from llm_distill.cache import shards
from llm_distill.cache.estimators import hidden
from llm_distill.cache.layers import Layers
from llm_distill.caching.plan import Capture, Part, loads_in
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import explicit, uniform
from tests import caches, tiny


def rows_of(made: Capture) -> list[Sequence[int]]:
    return [split.rows for split in made.named.values()]


def test_every_example_with_a_row_is_in_one_shard(tmp_path: Path) -> None:
    made = caches.capture(tmp_path)
    assert [part.number for part in made.parts] == list(range(len(made.parts)))
    for split, count in (("train", 23), ("eval", 8)):  # one has no rows
        shards = [part for part in made.parts if part.split == split]
        assert [place for part in shards for place in part.places] == list(range(count))
        assert all(made.rows(part) >= 40 for part in shards[:-1])
    assert sum(made.rows(part) for part in made.parts) == sum(map(sum, rows_of(made)))
    assert made.parts[0].file == "train-00000.parquet"
    assert made.parts[-1].file.startswith("eval-")


def test_what_stands_twice_is_asked_once(tmp_path: Path) -> None:
    rows = tiny.rows(6)
    twice = datasets.concatenate_datasets([rows, rows.select([2, 1])])
    made = caches.capture(tmp_path, train_dataset=twice, eval_dataset=rows.select([5]))
    assert [place for part in made.parts for place in part.places] == list(range(6))
    assert made.data()["eval"]["examples"] == 1


class TestHints:
    HINT = HiddenStates(layers=partial(explicit, pairs=[[1, 2], [2, 4]]))

    def test_which_states(self, tmp_path: Path) -> None:
        assert caches.capture(tmp_path).layers is None
        made = caches.capture(tmp_path, hints=[self.HINT])
        assert made.layers == Layers((2, 4), "supervised", 64, 64)
        every = caches.capture(tmp_path, hints=[replace(self.HINT, rows="valid")], width=9)
        assert every.layers == Layers((2, 4), "valid", 64, 9)
        assert made.columns == (*made.estimator.columns, *made.layers.columns)

    def test_bytes(self, tmp_path: Path) -> None:
        plain, made = caches.capture(tmp_path), caches.capture(tmp_path, hints=[self.HINT])
        for one, other in zip(plain.parts, made.parts, strict=True):
            assert one.places == other.places
            rows = made.rows(other)
            added = made.bytes(other) - plain.bytes(one) - rows * 2 * (64 + 2)
            beside = [shards.most_bytes(columns, 0, len(one.places), 0) for columns in (0, 4)]
            assert 0 < added == pytest.approx(beside[1] - beside[0])

    def test_examples_with_tokens_alone(self, tmp_path: Path) -> None:
        """Nothing is supervised in one of 24; its states may be asked for all the same."""
        every = replace(self.HINT, rows="valid")
        own: dict[str, Any] = {"data_collator": Collator(pad_token_id=0)}
        for hint, count in ((self.HINT, 23), (every, 24)):
            made = caches.capture(tmp_path, hints=[hint], **own)
            places = [k for part in made.parts if part.split == "train" for k in part.places]
            assert len(places) == count
            assert (3 in places) == (count == 24)

    def test_shards_of_many_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("llm_distill.caching.plan.SHARD_ROWS", 20)
        made = caches.capture(tmp_path, hints=[self.HINT], shard_rows=None)
        assert len(made.parts) == 2
        monkeypatch.setattr("llm_distill.caching.plan.SHARD_BYTES", 4000)
        made = caches.capture(tmp_path, hints=[self.HINT], shard_rows=None)
        assert len(made.parts) > 4
        train = [part for part in made.parts if part.split == "train"]
        beside = shards.most_bytes(len(made.columns), 0, 9, 0)
        assert all(4000 <= made.bytes(part) < 12000 + beside for part in train[:-1])

    def test_on_maps_the_data_are_not_read_again(self, tmp_path: Path) -> None:
        made = caches.capture(tmp_path, hints=[HiddenStates()])
        first, second = made.run.objectives
        decided = [first.with_map(uniform(2, 4)), second]  # type: ignore[attr-defined]  # Mapped
        moved = made.on_maps(decided, {"HiddenStates": {}})
        assert moved.named is made.named
        assert moved.layers is not None
        assert moved.layers.layers == (2, 4)
        assert made.maps == {}


def test_the_dtype_that_is_loaded(tmp_path: Path) -> None:
    tiny.llama("teacher").bfloat16().save_pretrained(tmp_path)
    for spec in (Local(str(tmp_path)), Local(str(tmp_path), dtype="float32")):
        assert loads_in(spec) is spec.load().dtype
    assert loads_in(Local(tiny.llama("teacher").half(), dtype="float32")) is torch.float16
    assert loads_in(Local(str(tmp_path), quantize="torchao_int8")) is torch.bfloat16


def test_several_evaluation_sets(tmp_path: Path) -> None:
    rows = tiny.rows(6)
    both = {"a": rows.select([0, 1]), "b": rows.select([2])}
    made = caches.capture(tmp_path, train_dataset=rows.select([3, 4]), eval_dataset=both)
    assert list(made.named) == ["train", "eval[a]", "eval[b]"]
    assert {part.file.split("-")[0] for part in made.parts} == {"train", "eval"}
    assert len({part.file for part in made.parts}) == len(made.parts)


def test_shards_are_large_by_default(tmp_path: Path) -> None:
    assert [part.split for part in caches.capture(tmp_path, shard_rows=None).parts] == [
        "train",
        "eval",
    ]


def test_tokens_of_both_models(tmp_path: Path) -> None:
    teacher = tiny.llama("teacher", vocabulary=140)
    assert caches.capture(tmp_path, model=teacher).vocabulary == tiny.VOCABULARY
    assert caches.capture(tmp_path, hidden, model=teacher).vocabulary == 140


def test_what_the_manifest_says_of_the_data(tmp_path: Path) -> None:
    told = caches.capture(tmp_path).data()
    assert (told["train"]["examples"], told["eval"]["examples"]) == (23, 8)
    other = caches.capture(tmp_path, train_dataset=tiny.rows(23)).data()
    assert told["train"]["keys"] != other["train"]["keys"]


class TestWhole:
    def made(self, tmp_path: Path) -> tuple[Capture, Part]:
        made = caches.capture(tmp_path)
        part = made.parts[0]
        made.folder.mkdir()
        (made.folder / part.file).write_bytes(b"12345")
        note: dict[str, Any] = {"shard": {"bytes": 5}, "keys": made.digest(part)}
        made.note(part).write_text(json.dumps(note))
        return made, part

    def test_with_its_note(self, tmp_path: Path) -> None:
        made, part = self.made(tmp_path)
        assert made.is_whole(part)
        assert not made.is_whole(made.parts[1])

    def test_not_without(self, tmp_path: Path) -> None:
        made, part = self.made(tmp_path)
        made.note(part).unlink()
        assert not made.is_whole(part)

    def test_not_with_another_size(self, tmp_path: Path) -> None:
        made, part = self.made(tmp_path)
        (made.folder / part.file).write_bytes(b"123")
        assert not made.is_whole(part)

    def test_not_with_other_examples(self, tmp_path: Path) -> None:
        made, _ = self.made(tmp_path)
        larger = caches.capture(tmp_path, shard_rows=80)
        assert made.parts[0].places != larger.parts[0].places
        assert not larger.is_whole(larger.parts[0])


def test_a_stream_is_refused(tmp_path: Path) -> None:
    made = caches.capture(tmp_path, train_dataset=tiny.rows(8).to_iterable_dataset())
    with pytest.raises(InputError, match="the train data is a stream"):
        _ = made.parts


def test_nothing_to_write(tmp_path: Path) -> None:
    made = caches.capture(tmp_path, train_dataset=None, eval_dataset=None)
    with pytest.raises(InputError, match="there is no data to cache"):
        _ = made.parts
