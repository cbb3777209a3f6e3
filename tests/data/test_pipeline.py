import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Collator, Data, Prepared, load, prepare
from llm_distill.errors import InputError

Lines = Callable[[str, list[dict[str, object]]], str]
Numbered = Callable[[str, int], str]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
END = 1


def decoded(prepared: Prepared, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(row["input_ids"])) for row in prepared.train]


def test_a_dataset_in_memory(table: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = prepare(table, Data(max_length=20), tokenizer)
    assert isinstance(prepared.train, Dataset)
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert decoded(prepared, tokenizer) == ["hello world</s>", ("the cat " * 10).strip(), "you</s>"]
    assert all(row["labels"] == row["input_ids"] for row in prepared.train)
    assert (prepared.eval, prepared.eval_report, prepared.counter) == (None, None, None)
    assert str(prepared.report) == (
        "4 examples: 1 truncated at 20 tokens, 1 dropped (empty, or nothing supervised); "
        "25 tokens, 22 of them supervised"
    )


def test_a_stream_in_memory_stays_one_and_gives_the_same(
    table: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = prepare(table.to_iterable_dataset(), Data(max_length=20), tokenizer)
    whole = prepare(table, Data(max_length=20), tokenizer)
    assert isinstance(stream.train, IterableDataset)
    assert list(stream.train) == list(whole.train)
    assert str(stream.report).removeprefix("4 examples of a stream") == str(
        whole.report
    ).removeprefix("4 examples")


def test_what_is_prepared_can_be_prepared_again(
    table: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    once = prepare(table, Data(max_length=20), tokenizer)
    assert list(prepare(once.train, Data(), tokenizer).train) == list(once.train)


def test_the_format_that_a_user_set_does_not_matter(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = Dataset.from_dict({"input_ids": [[5, 6, END], [7, 8]]})
    for kind in ("torch", "numpy", "arrow"):
        prepared = prepare(plain.with_format(kind), Data(), tokenizer)
        assert next(iter(prepared.train)) == {"input_ids": [5, 6, END], "labels": [5, 6, END]}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_from_a_file_to_a_batch(
    tokenizer: PreTrainedTokenizerFast, streaming: bool, lines: Lines
) -> None:
    user = {"role": "user", "content": "hello"}
    answer = {"role": "assistant", "content": "the cat"}
    formats: dict[str, tuple[dict[str, object], str]] = {
        "text": ({"text": "the cat"}, "the cat</s>"),
        "pairs": ({"prompt": "hello", "completion": " the cat"}, " the cat</s>"),
        "chat": ({"prompt": [user], "completion": [answer]}, "the cat</s>\n"),
        "messages": ({"messages": [user, answer]}, "the cat</s>"),
        "ids": ({"input_ids": [5, END, END], "labels": [-100, END, END]}, "</s></s>"),
    }
    for name, (row, supervised) in formats.items():
        data = Data(path=lines(f"{name}.jsonl", [row]), streaming=streaming)
        prepared = load(data, tokenizer, max_positions=2048)
        batch = Collator.of(tokenizer)(list(prepared.train))
        labels = batch["labels"][0]
        assert tokenizer.decode(labels[labels != -100]) == supervised
        assert batch["attention_mask"].all()


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool) -> None:
    text = "the cat sat on the mat\n" * 20
    (tmp_path / "a.txt").write_text(text)
    data = Data(path=str(tmp_path / "a.txt"), max_length=16, streaming=streaming)
    prepared = load(data, tokenizer, max_positions=None)
    assert "".join(decoded(prepared, tokenizer)) == text + "</s>"
    assert prepared.report.truncated == prepared.report.dropped == 0
    short = load(
        Data(path=data.path, max_length=16, streaming=streaming, limit=2),
        tokenizer,
        max_positions=None,
    )
    assert list(short.train) == list(prepared.train)[:2]


def test_a_block_of_one_token_at_the_end_is_dropped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    data = Data(path=str(tmp_path / "a.txt"), max_length=2)
    report = load(data, tokenizer, max_positions=None).report
    assert (report.examples, report.dropped, report.tokens) == (2, 1, 2)


def test_more_tokens_than_positions_are_refused(
    table: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    message = (
        "data.max_length: 1024 tokens are more than the 512 positions of the models; write "
        "max_length: 512 or less"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(table, Data(), tokenizer, max_positions=512)
    with pytest.raises(InputError, match=re.escape(message)):
        load(Data(path="no/such/path"), tokenizer, max_positions=512)


@pytest.mark.parametrize(
    ("length", "positions", "cut"), [(None, 8, 8), (None, None, 101), (8, 8, 8), (6, 8, 6)]
)
def test_where_examples_are_cut(
    tokenizer: PreTrainedTokenizerFast,
    table: Dataset,
    length: int | None,
    positions: int | None,
    cut: int,
) -> None:
    prepared = prepare(table, Data(max_length=length), tokenizer, max_positions=positions)
    assert max(len(row["input_ids"]) for row in prepared.train) == pytest.approx(cut, abs=1)
    assert prepared.report.max_length == (length or positions)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_limit(tokenizer: PreTrainedTokenizerFast, streaming: bool, numbered: Numbered) -> None:
    data = Data(path=numbered("a.jsonl", 5), limit=3, streaming=streaming)
    prepared = load(data, tokenizer, max_positions=None)
    assert decoded(prepared, tokenizer) == ["hello 0</s>", "hello 1</s>", "hello 2</s>"]
    assert prepared.report.examples == 3
    many = Data(path=data.path, limit=99, streaming=streaming)
    assert load(many, tokenizer, max_positions=None).report.examples == 5


@pytest.mark.parametrize("wrong", [DatasetDict(), [{"text": "a"}], None])
def test_what_is_no_dataset_is_refused(tokenizer: PreTrainedTokenizerFast, wrong: object) -> None:
    kind = type(wrong).__name__
    with pytest.raises(
        InputError, match=rf"the data is a {kind}, not a datasets.Dataset .* dataset\['train'\]"
    ):
        prepare(wrong, Data(), tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_dataset_is_refused(tokenizer: PreTrainedTokenizerFast, stream: bool) -> None:
    one = Dataset.from_dict({"text": ["hello"]})
    dataset = one.to_iterable_dataset().take(0) if stream else one.select([])
    with pytest.raises(InputError, match="the dataset holds no examples"):
        prepare(dataset, Data(), tokenizer)


@pytest.mark.parametrize(
    ("stream", "which"),
    [(False, "the 3 examples of"), (True, "the first 3 examples of the stream of")],
)
def test_nothing_supervised_is_refused(
    tokenizer: PreTrainedTokenizerFast, stream: bool, which: str
) -> None:
    rows = Dataset.from_dict({"prompt": ["hello " * 50] * 3, "completion": ["you"] * 3})
    dataset = rows.to_iterable_dataset() if stream else rows
    message = (
        f"0 supervised tokens in {which} the dataset (3 truncated): the completions are empty, or "
        "cut off at data.max_length 16: write a larger one"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(dataset, Data(max_length=16), tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_row_is_named(tokenizer: PreTrainedTokenizerFast, stream: bool) -> None:
    rows = Dataset.from_dict({"text": ["a", "b", None]})
    message = "row 2 of the dataset (counted from 0): column 'text' has nothing (null), not a str"
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(rows.to_iterable_dataset() if stream else rows, Data(), tokenizer)


def test_several_processes_give_the_same_and_name_bad_rows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = Dataset.from_dict({"text": [f"hello {n}" for n in range(8)]})
    one = prepare(rows, Data(), tokenizer)
    two = prepare(rows, Data(num_proc=2), tokenizer)
    assert list(one.train) == list(two.train)
    assert one.report == two.report
    bad = Dataset.from_dict({"text": ["a", "b", "c", None]})
    with pytest.raises(InputError, match=r"row 3 of the dataset \(counted from 0\): column 'text'"):
        prepare(bad, Data(num_proc=2), tokenizer)


class TestKeptColumns:
    """Columns that stay beside the tokens."""

    ROWS: ClassVar = [
        {"text": "hello world", "kind": "a", "n": 1, "other": 0},
        {"text": "", "kind": "b", "n": 2, "other": 0},
        {"text": "you", "kind": "c", "n": 3, "other": 0},
    ]

    def test_of_a_table(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """With their types, and without those of rows that are of no use."""
        kept = prepare(Dataset.from_list(self.ROWS), Data(keep=("kind", "n")), tokenizer).train
        assert kept.column_names == ["input_ids", "labels", "kind", "n"]
        assert [(row["kind"], row["n"]) for row in kept] == [("a", 1), ("c", 3)]
        plain = prepare(Dataset.from_list(self.ROWS), Data(), tokenizer).train
        assert [row["input_ids"] for row in kept] == [row["input_ids"] for row in plain]

    def test_of_a_stream(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """As text."""
        stream = Dataset.from_list(self.ROWS).to_iterable_dataset()
        kept = prepare(stream, Data(keep=("kind", "n")), tokenizer).train
        assert [(row["kind"], row["n"]) for row in kept] == [("a", "1"), ("c", "3")]

    def test_one_that_is_read_as_well(self, tokenizer: PreTrainedTokenizerFast) -> None:
        table = Dataset.from_list(self.ROWS)
        for rows in (table, table.to_iterable_dataset()):
            kept = prepare(rows, Data(keep=("text",)), tokenizer).train
            assert [row["text"] for row in kept] == ["hello world", "you"]

    def test_of_what_is_held_out(self, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = [self.ROWS[0] | {"n": k} for k in range(8)]
        found = prepare(Dataset.from_list(rows), Data(keep=("n",), eval=0.25), tokenizer)
        assert found.eval is not None
        assert sorted(row["n"] for part in (found.train, found.eval) for row in part) == [*range(8)]

    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_is_not_there(self, tokenizer: PreTrainedTokenizerFast, stream: bool) -> None:
        table = Dataset.from_list(self.ROWS)
        rows = table.to_iterable_dataset() if stream else table
        with pytest.raises(InputError, match="no column 'x', which is to be kept; it has text, ki"):
            prepare(rows, Data(keep=("x",)), tokenizer)
