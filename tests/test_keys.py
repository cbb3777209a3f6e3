"""Examples by name: the same in any batch, rank and pack; another one for anything else."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.keys import KEY_BYTES, Examples, begins, example_key
from tests import tiny

EXAMPLES = [tiny.rows()[k] for k in range(6)]


def names(examples: list[dict[str, list[int]]], side: str = "right") -> Examples:
    collate = RowCollator(
        Collator(pad_token_id=0, padding_side=side), shift=True, valid=False, named=True
    )
    found: Examples = collate(examples)["examples"]
    return found


def test_a_key_follows_from_tokens_and_what_is_supervised() -> None:
    tokens, places = np.arange(5), np.array([1, 3])
    key = example_key(tokens, places)
    assert len(key) == KEY_BYTES
    assert key == example_key(tokens.astype(np.int32), places.astype(np.int16))
    others = [
        (tokens[::-1], places),
        (tokens[:4], places),
        (tokens, places[:1]),
        (np.arange(6), places),
        (np.array([0, 1, 2, 3]), np.array([4, 1, 3])),  # the same bytes, cut elsewhere
    ]
    assert len({key, *(example_key(*other) for other in others)}) == 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_same_in_any_batch_and_on_any_side(side: str) -> None:
    alone = [names([example]).keys[0] for example in EXAMPLES]
    assert len(set(alone)) == len(EXAMPLES)
    together = names(EXAMPLES[::-1], side)
    assert together.keys == tuple(alone[::-1])
    assert together.per_sequence == (1,) * 6


def test_rows_are_counted_for_each() -> None:
    collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=False, named=True)
    batch = collate(EXAMPLES)
    assert batch["examples"].rows == batch["rows"].per_sequence


def test_a_pack_has_the_keys_of_its_examples() -> None:
    collate = RowCollator(DataCollatorWithFlattening(), shift=True, valid=False, named=True)
    packed = collate(EXAMPLES)["examples"]
    alone = names(EXAMPLES)
    assert packed.keys == alone.keys
    assert packed.rows == alone.rows
    assert packed.per_sequence == (6,)


def test_other_labels_are_another_example() -> None:
    example = EXAMPLES[0]
    other = {**example, "labels": example["input_ids"]}
    assert names([example]).keys != names([other]).keys


def test_the_first_sequences_alone() -> None:
    given = Examples((b"a", b"b", b"c"), (1, 2, 3), (2, 1), (4, 5, 6))
    assert given.first(1) == Examples((b"a", b"b"), (1, 2), (2,), (4, 5))


def test_nothing_is_named_where_nobody_asks() -> None:
    collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=False)
    assert "examples" not in collate(EXAMPLES)


def test_masked_models_supervise_the_token_itself() -> None:
    labels = [-100, 5, -100]
    example = {"input_ids": [4, 9, 6], "labels": labels}
    collate = RowCollator(Collator(pad_token_id=0), shift=False, valid=False, named=True)
    found = collate([example])["examples"]
    assert found.keys == (example_key(np.array([4, 9, 6]), np.array([1])),)
    assert found.rows == (1,)
    assert torch.equal(collate([example])["rows"].labels, torch.tensor([5]))


def test_those_of_some_sequences() -> None:
    """Sequences whose rows were left out have none: they stand behind those that count."""
    every = Examples((b"a", b"b", b"c", b"d"), (1, 2, 3, 4), (1, 2, 1), (5, 6, 7, 8))
    assert every.only([1]) == Examples((b"b", b"c"), (2, 3), (2,), (6, 7))
    assert every.only([0, 2]) == Examples((b"a", b"d"), (1, 4), (1, 1), (5, 8))
    assert every.first(1).only([0, 2]) == Examples((b"a",), (1,), (1,), (5,))


def test_where_examples_begin() -> None:
    real = np.array([[True] * 4, [False, False, True, True]])
    places = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]])  # padding on the left counts from 0 too
    assert begins(real, places) == [[0, 2], [0]]
    assert begins(real, places[:1]) == [[0, 2], [0]]  # one row for all
    assert begins(real, None) == [[0], [0]]
