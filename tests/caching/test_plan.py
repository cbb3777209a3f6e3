"""Shards follow from the data: every example once, in order, whatever the ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm_distill.cache.estimators import hidden
from llm_distill.caching.plan import Capture, Part
from llm_distill.errors import InputError
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
