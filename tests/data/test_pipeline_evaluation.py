import re
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Data, load, prepare
from llm_distill.errors import InputError

Numbered = Callable[[str, int], str]


def test_a_fraction_is_held_out_by_its_seed(
    tokenizer: PreTrainedTokenizerFast, numbered: Numbered
) -> None:
    path = numbered("a.jsonl", 20)

    def split(seed: int) -> tuple[set[str], set[str]]:
        data = Data(path=path, eval=0.25, shuffle_seed=seed)
        prepared = load(data, tokenizer, max_positions=None)
        assert prepared.report.held_out == 5
        assert "20 examples: " in str(prepared.report)
        assert "5 held out for evaluation" in str(prepared.report)
        assert prepared.eval is not None
        kept, held = (
            {str(tokenizer.decode(row["input_ids"])) for row in part}
            for part in (prepared.train, prepared.eval)
        )
        return kept, held

    kept, held = split(0)
    assert (len(kept), len(held), len(kept | held)) == (15, 5, 20)
    assert split(0) == (kept, held)
    assert split(1) != (kept, held)


def test_a_fraction_of_a_dataset_in_memory(
    table: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = prepare(table, Data(eval=0.01), tokenizer)
    assert prepared.eval is not None
    assert (len(list(prepared.train)), len(list(prepared.eval))) == (2, 1)


def test_a_fraction_that_leaves_nothing_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    one = Dataset.from_dict({"text": ["hello world"]})
    with pytest.raises(
        InputError, match=r"data.eval: 0.5 of 1 examples leaves nothing to train on; give more data"
    ):
        prepare(one, Data(eval=0.5), tokenizer)


def test_a_fraction_of_a_stream_is_refused(
    table: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        InputError,
        match=r"data.eval: 0.5 of a stream cannot be held out.* write a split .* or a path",
    ):
        prepare(table.to_iterable_dataset(), Data(eval=0.5), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_on_a_split_of_the_same_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool, numbered: Numbered
) -> None:
    numbered("train.jsonl", 3)
    numbered("test.jsonl", 2)
    data = Data(path=str(tmp_path), eval="test", streaming=streaming)
    prepared = load(data, tokenizer, max_positions=None)
    assert prepared.eval is not None
    assert prepared.eval_report is not None
    assert (len(list(prepared.train)), len(list(prepared.eval))) == (3, 2)
    assert (prepared.report.examples, prepared.eval_report.examples) == (3, 2)
    assert isinstance(prepared.eval, IterableDataset) is streaming


def test_evaluation_on_another_path(tokenizer: PreTrainedTokenizerFast, numbered: Numbered) -> None:
    train, held = numbered("a.jsonl", 3), numbered("b.jsonl", 2)
    prepared = load(Data(path=train, eval=held), tokenizer, max_positions=None)
    assert prepared.eval is not None
    assert len(list(prepared.eval)) == 2


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("test", "data.eval: '{train}' has no split 'test'; it has train"),
        ("{folder}/c.jsonl", "data.eval: no file or folder '{folder}/c.jsonl'; did you mean"),
    ],
)
def test_errors_of_the_evaluation_data_say_so(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    evaluation: str,
    message: str,
    numbered: Numbered,
) -> None:
    train = numbered("a.jsonl", 3)
    data = Data(path=train, eval=evaluation.format(folder=tmp_path))
    with pytest.raises(InputError, match=re.escape(message.format(train=train, folder=tmp_path))):
        load(data, tokenizer, max_positions=None)


def test_a_dataset_in_memory_has_no_other_splits(
    table: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match=r"data.eval: 'test' cannot be found from a dataset in"):
        prepare(table, Data(eval="test"), tokenizer)
