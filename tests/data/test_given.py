"""Datasets in memory: what is tokenised, what is left alone, and what is refused."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import DataCollatorWithFlattening, default_data_collator

from llm_distill import DistillTrainer
from llm_distill.data.given import first_of, tokenised
from llm_distill.errors import InputError
from tests import on_disk, tiny

if TYPE_CHECKING:
    from llm_distill.data import Prepared


class Table(TorchDataset[dict[str, torch.Tensor]]):
    """Somebody's own."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(index + 2)}


class Stream(TorchStream[int]):
    """Somebody's own, read once."""

    def __iter__(self) -> Any:
        return iter([1, 2])


def ask(
    dataset: Any, *, positions: int | None = None, tokenizer: Any = None, keep: bool = False
) -> tuple[Any, list[str]]:
    """The dataset as it is trained on, and the reports."""
    seen: dict[str, Prepared] = {}
    found = tokenised(dataset, tokenizer, positions, seen, "train_dataset", keep_tokens=keep)
    return found, [f"{name}: {prepared.report}" for name, prepared in seen.items()]


class TestTokenised:
    def test_text_goes_through_the_tokenizer(self) -> None:
        text = {"text": on_disk.SENTENCES}
        found, reports = ask(
            datasets.Dataset.from_dict(text), tokenizer=on_disk.tokenizer(), positions=8
        )
        ids = on_disk.tokenizer()(on_disk.SENTENCES[0])["input_ids"]
        assert found[0]["input_ids"] == ids[:8]
        assert found[0]["labels"] == ids[:8]
        assert len(reports) == 1
        assert reports[0].startswith("train_dataset: 4 examples")
        assert "truncated" in reports[0]

    def test_a_stream_stays_one(self) -> None:
        stream = datasets.Dataset.from_dict({"text": on_disk.SENTENCES}).to_iterable_dataset()
        found, _ = ask(stream, tokenizer=on_disk.tokenizer())
        assert isinstance(found, datasets.IterableDataset)
        assert len(list(found)) == 4

    def test_several_are_each_tokenised(self) -> None:
        part = datasets.Dataset.from_dict({"text": on_disk.SENTENCES})
        found, reports = ask({"a": part, "b": tiny.rows(2)}, tokenizer=on_disk.tokenizer())
        assert sorted(found) == ["a", "b"]
        assert [r.split(":")[0] for r in reports] == ["train_dataset[a]", "train_dataset[b]"]

    @pytest.mark.parametrize("dataset", [None, Table(), Stream(), [{"input_ids": [1, 2]}]])
    def test_what_is_no_datasets_object_is_left_alone(self, dataset: Any) -> None:
        assert ask(dataset) == (dataset, [])

    def test_tokens_are_left_to_a_collator_of_the_users_own(self) -> None:
        data = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "token_type_ids": [[0, 1]]})
        assert ask(data, keep=True)[0] is data
        assert ask(data)[0].column_names == ["input_ids", "labels"]
        text = datasets.Dataset.from_dict({"text": on_disk.SENTENCES})
        assert ask(text, tokenizer=on_disk.tokenizer(), keep=True)[0].column_names == [
            "input_ids",
            "labels",
        ]

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("empty", [[], datasets.Dataset.from_dict({"input_ids": []})])
    def test_empty_ones_are_refused(self, empty: Any, keep: bool) -> None:
        with pytest.raises(InputError, match="train_dataset is empty"):
            ask(empty, keep=keep)

    def test_text_without_a_tokenizer_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"columns \['text'\] and no tokenizer is known; give"):
            ask(datasets.Dataset.from_dict({"text": ["a"]}))
        assert len(ask(tiny.rows(2))[0]) == 2


class TestFirst:
    def test_what_has_places_shows_its_first(self) -> None:
        assert list(first_of([3, 4], 1)) == [3]
        assert list(first_of([3, 4], 5)) == [3, 4]
        assert list(first_of(tiny.rows(2), 2)) == list(tiny.rows(2))
        assert [len(row["input_ids"]) for row in first_of(Table(), 9)] == [2, 3]

    def test_no_more_is_read_than_is_asked_for(self) -> None:
        class Lazy(Table):
            def __getitem__(self, index: int) -> Any:
                assert index == 0
                return {}

        assert next(first_of(Lazy(), 2)) == {}

    @pytest.mark.parametrize("dataset", [None, Stream(), tiny.rows(2).to_iterable_dataset()])
    def test_streams_are_not_touched(self, dataset: Any) -> None:
        assert list(first_of(dataset, 3)) == []


def test_packed_rows_need_a_collator_of_their_own() -> None:
    """Their positions would be lost, and documents would see each other."""
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}])
    message = "has position_ids, .*=transformers.default_data_collator; else give one example in"
    with pytest.raises(InputError, match=f"train_dataset {message}"):
        tokenised(rows, None, None, {}, "train_dataset")
    assert tokenised(rows, None, None, {}, "train_dataset", keep_tokens=True) is rows


def test_what_packed_rows_are_told_to_take(tmp_path: Path) -> None:
    """Rows that are packs, as they are, and their examples one by one: the same training."""
    tokens = [[5, 6, 7, 8, 9], [9, 8, 7], [11, 12, 13, 14], [21, 22, 23, 24]] * 4
    apart = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in tokens]
    packs = [
        {
            "input_ids": one["input_ids"] + two["input_ids"],
            "labels": one["labels"] + two["labels"],
            "position_ids": [*range(len(one["labels"])), *range(len(two["labels"]))],
        }
        for one, two in zip(apart[::2], apart[1::2], strict=True)
    ]
    ends = []
    kinds: list[Any] = [(packs, default_data_collator, 4), (apart, DataCollatorWithFlattening(), 8)]
    for rows, collator, size in kinds:
        data = datasets.Dataset.from_list(rows)
        args = tiny.arguments(tmp_path, learning_rate=0.1, per_device_train_batch_size=size)
        given: dict[str, Any] = {"train_dataset": data, "data_collator": collator}
        made = DistillTrainer(tiny.llama("student"), tiny.llama("teacher"), None, args, **given)
        made.train()
        ends.append(torch.nn.utils.parameters_to_vector(made.student.parameters()))
    start = torch.nn.utils.parameters_to_vector(tiny.llama("student").parameters())
    assert (ends[0] - start).abs().max() > 1e-3
    assert (ends[0] - ends[1]).abs().max() < 1e-6
