"""`Example`: tokens and labels, made of text or of tokens; what every format needs for it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

IGNORE = -100  # The label of a token that is not supervised, in all of Hugging Face.


class Example(NamedTuple):
    """One example; `labels` are `ids`, or `IGNORE` where nothing is supervised."""

    ids: list[int]
    labels: list[int]


EMPTY = Example([], [])


class BadRow(Exception):  # noqa: N818 - becomes an InputError that names the row
    """What is wrong with a row, without the row's number."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True
) -> list[list[int]]:
    """Tokenise texts whole; `special` adds what the tokenizer adds by itself."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # No warning about a text that is longer than the model: we cut it.
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Append the end of sequence, if there is one and it is not there yet."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def after(boundary: int, ids: list[int]) -> Example:
    """Supervise the tokens from a boundary on."""
    return Example(ids, [IGNORE] * boundary + ids[boundary:])


def string(value: object, column: str) -> str:
    """The value of a column of text.

    Raises:
        BadRow: If it is no string.
    """
    if isinstance(value, str):
        return value
    found = "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    raise BadRow(f"column '{column}' has {found}, not a string; correct or remove the row")


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Example]:
    """Supervise everything, the end of sequence included; a text without a letter is empty."""
    encoded = tokenize(tokenizer, texts)
    return [
        after(0, with_end(ids, tokenizer)) if text else EMPTY
        for text, ids in zip(texts, encoded, strict=True)
    ]


def encode_ids(values: Mapping[str, object]) -> Example:
    """Take what is tokenised already; positions hidden by an ``attention_mask`` are padding.

    Raises:
        BadRow: If a column is no list of integers, or if lengths differ.
    """
    ids = _integers(values["input_ids"], "input_ids")
    labels = _integers(values["labels"], "labels") if "labels" in values else ids
    mask = [1] * len(ids)
    if "attention_mask" in values:
        mask = _integers(values["attention_mask"], "attention_mask")
    if not len(ids) == len(labels) == len(mask):
        raise BadRow(
            f"input_ids, labels and attention_mask have {len(ids)}, {len(labels)} and {len(mask)} "
            "entries; they must have the same number (labels are not shifted)"
        )
    kept = [place for place, keep in enumerate(mask) if keep]
    return Example([ids[place] for place in kept], [labels[place] for place in kept])


def _integers(value: object, column: str) -> list[int]:
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return value
    raise BadRow(f"column '{column}' has {str(value)[:40]!r}, not a list of integers")
