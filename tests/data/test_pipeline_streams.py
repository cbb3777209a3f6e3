from collections.abc import Iterator

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Collator, Data, prepare
from llm_distill.errors import InputError


def endless() -> Iterator[dict[str, list[int]]]:
    number = 0
    while True:
        yield {"input_ids": [5, 6, 7], "labels": [-100, -100, 7 if number >= 1000 else -100]}
        number += 1


def test_only_the_first_1000_examples_of_a_stream_are_checked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    stream = IterableDataset.from_generator(endless)
    with pytest.raises(InputError, match="in the first 1,000 examples of the stream of the data"):
        prepare(stream, Data(), tokenizer)
    prepared = prepare(stream.skip(1), Data(), tokenizer)
    assert prepared.report.dropped == 999
    assert prepared.report.examples == 1000


def test_later_examples_of_a_stream_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = prepare(IterableDataset.from_generator(endless).skip(990), Data(), tokenizer)
    assert prepared.counter is not None
    assert prepared.counter.report().examples == 0
    assert len(list(prepared.train.take(5))) == 5
    seen = prepared.counter.report()
    assert seen.dropped == 10
    assert seen.examples >= 15
    assert seen.supervised_tokens == seen.examples - seen.dropped


def test_dataloader_workers_are_counted_too(
    tokenizer: PreTrainedTokenizerFast, table: Dataset
) -> None:
    stream = table.to_iterable_dataset(num_shards=2)
    prepared = prepare(stream, Data(max_length=20), tokenizer)
    loader = torch.utils.data.DataLoader(
        prepared.train, batch_size=2, num_workers=2, collate_fn=Collator.of(tokenizer)
    )
    assert sum(len(batch["input_ids"]) for batch in loader) == 3
    assert prepared.counter is not None
    assert prepared.counter.report() == prepared.report
