import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from llm_distill.data.encode import (
    BadRow,
    after,
    common,
    encode_ids,
    encode_text,
    string,
    tokenize,
    with_end,
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
BOS, END = 0, 1


def test_text_ends_with_the_end_of_sequence_and_is_supervised_whole(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (example,) = encode_text(tokenizer, ["hello world"])
    assert tokenizer.decode(example.ids) == "hello world</s>"
    assert example.labels == example.ids


@pytest.mark.parametrize(
    ("adds", "begins"), [("", False), ("bos", True), ("bos eos", True)], ids=str
)
def test_text_begins_as_the_tokenizer_does_and_ends_once(
    make_tokenizer: MakeTokenizer, adds: str, begins: bool
) -> None:
    (example,) = encode_text(make_tokenizer(adds=adds), ["hello world"])
    assert (example.ids[0] == BOS) is begins
    assert example.ids.count(END) == 1
    assert example.ids[-1] == END


def test_an_end_that_the_text_has_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = encode_text(tokenizer, ["hello</s>"])
    assert example.ids.count(END) == 1


def test_empty_texts_are_empty_examples(make_tokenizer: MakeTokenizer) -> None:
    empty, full = encode_text(make_tokenizer(adds="bos"), ["", " "])
    assert empty.ids == []
    assert full.ids


def test_a_tokenizer_without_an_end_adds_none(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert with_end([5], endless) == [5]
    assert with_end([5], tokenizer) == [5, END]
    assert with_end([], tokenizer) == [END]


def test_texts_are_tokenised_whole_whatever_the_tokenizer_was_told_before(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer(["hello"], truncation=True, max_length=1, padding="max_length")
    short, long = tokenize(tokenizer, ["hello", "hello " * 50])
    assert len(short) == 1
    assert len(long) > 50
    assert tokenize(tokenizer, []) == []


def test_labels_begin_at_the_boundary() -> None:
    assert after(2, [5, 6, 7]) == ([5, 6, 7], [-100, -100, 7])


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ("ab", "ab", 2)],
)
def test_common_beginnings(one: list[int], other: list[int], length: int) -> None:
    assert common(one, other) == length


def test_tokens_without_labels_are_supervised_whole() -> None:
    assert encode_ids({"input_ids": [5, END, END]}) == ([5, END, END], [5, END, END])


def test_tokens_keep_their_labels() -> None:
    row = {"input_ids": [5, 6, END], "labels": [-100, 6, END]}
    assert encode_ids(row) == ([5, 6, END], [-100, 6, END])


def test_padding_that_a_mask_shows_is_removed() -> None:
    row = {"input_ids": [END, 5, END, END], "attention_mask": [0, 1, 1, 0]}
    assert encode_ids(row) == ([5, END], [5, END])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": None}, "column 'input_ids' has 'None', not a list of integers"),
        ({"input_ids": ["a"]}, "column 'input_ids' has \"['a']\", not a list of integers"),
        (
            {"input_ids": [1, 2], "labels": None},
            "column 'labels' has 'None', not a list of integers",
        ),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "input_ids, labels and attention_mask have 2, 1 and 2 entries; they must have the "
            "same number (labels are not shifted)",
        ),
    ],
)
def test_tokens_of_another_shape_are_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises(BadRow, match=re.escape(message)):
        encode_ids(row)


@pytest.mark.parametrize(
    ("value", "found"), [(None, "nothing (null)"), (3.5, "float '3.5'"), (["a"], "list \"['a']\"")]
)
def test_what_is_no_string_is_refused(value: object, found: str) -> None:
    message = f"column 'text' has {found}, not a string; correct or remove the row"
    with pytest.raises(BadRow, match=re.escape(message)):
        string(value, "text")
