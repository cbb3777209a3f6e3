"""Rows: shift and padding."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Literal

import pytest
import torch
from torch import Tensor

from llm_distill.queries import sample_queries
from llm_distill.rows import (
    IGNORED,
    Batch,
    Draw,
    Rows,
    example_keys,
    supervised_rows,
    valid_rows,
)

Side = Literal["left", "right"]

EOS = PAD = 2
"""The same number, as in many tokenizers: only the attention mask tells them apart."""

SEQUENCES = ([5, 6, 7, 8, EOS], [9, EOS], [10, 11, EOS, 12, 13, 14, EOS])
LABELS = ([IGNORED, IGNORED, 7, 8, EOS], [9, EOS], [10, IGNORED, EOS, 12, 13, IGNORED, EOS])


def padded(
    sequences: Sequence[Sequence[int]], filler: int, side: Side, width: int | None = None
) -> Tensor:
    """One block, `[B, T]`."""
    width = width or max(len(s) for s in sequences)
    blank = [[filler] * (width - len(s)) for s in sequences]
    rows = [[*b, *s] if side == "left" else [*s, *b] for b, s in zip(blank, sequences, strict=True)]
    return torch.tensor(rows)


def batch(side: Side, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and labels of the examples above."""
    ones = [[1] * len(s) for s in SEQUENCES]
    return (
        padded(SEQUENCES, PAD, side, width),
        padded(ones, 0, side, width),
        padded(LABELS, IGNORED, side, width),
    )


def said(rows: Rows) -> list[tuple[int, int, int]]:
    """(sequence, token, label) of each row: what padding must not change."""
    return list(zip(rows.sequence.tolist(), rows.token.tolist(), rows.labels.tolist(), strict=True))


def expected(*, shift: bool) -> list[tuple[int, int, int]]:
    """The same from the examples themselves, by the definition."""
    found = []
    for number, (tokens, labels) in enumerate(zip(SEQUENCES, LABELS, strict=True)):
        targets = [*labels[1:], IGNORED] if shift else labels
        found += [
            (number, token, label)
            for token, label in zip(tokens, targets, strict=True)
            if label != IGNORED
        ]
    return found


every_padding = pytest.mark.parametrize(
    ("side", "width"), [("right", None), ("left", None), ("right", 12), ("left", 12)]
)


@every_padding
@pytest.mark.parametrize("shift", [True, False])
def test_padding_does_not_change_the_rows(side: Side, width: int | None, shift: bool) -> None:
    rows = supervised_rows(*batch(side, width), shift=shift)
    assert said(rows) == expected(shift=shift)


@every_padding
def test_fields_agree_with_each_other(side: Side, width: int | None) -> None:
    ids, mask, labels = batch(side, width)
    for rows in (supervised_rows(ids, mask, labels, shift=True), valid_rows(ids, mask)):
        assert torch.equal(rows.index, rows.sequence * ids.shape[1] + rows.position)
        assert torch.equal(rows.token, ids.flatten()[rows.index])
        assert torch.equal(rows.host_position, rows.position)
        assert rows.index.tolist() == sorted(rows.index.tolist())
        assert rows.per_sequence == tuple(rows.sequence.bincount(minlength=3).tolist())
        assert len(rows) == sum(rows.per_sequence) == len(rows.labels)
        assert mask.flatten()[rows.index].all()


@every_padding
def test_a_shifted_row_predicts_the_next_token(side: Side, width: int | None) -> None:
    ids, mask, labels = batch(side, width)
    rows = supervised_rows(ids, mask, labels, shift=True)
    assert rows.position.max() < ids.shape[1] - 1
    assert torch.equal(labels[rows.sequence, rows.position + 1], rows.labels)


def test_a_real_eos_is_a_target_although_it_looks_like_padding() -> None:
    for side in ("left", "right"):
        rows = supervised_rows(*batch(side), shift=True)
        assert rows.labels.tolist().count(EOS) == 4
        assert rows.token.tolist().count(EOS) == 1  # that inside the third predicts 12


def test_the_last_left_pad_does_not_predict_the_first_token() -> None:
    ids, mask = torch.tensor([[PAD, PAD, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    rows = supervised_rows(ids, mask, torch.tensor([[-100, -100, 5, 6]]), shift=True)
    assert rows.position.tolist() == [2]
    assert rows.labels.tolist() == [6]


def test_labels_on_padding_are_no_rows_without_a_shift() -> None:
    ids, mask = torch.tensor([[5, 6, PAD]]), torch.tensor([[1, 1, 0]])
    assert supervised_rows(ids, mask, ids, shift=False).labels.tolist() == [5, 6]


def test_without_a_mask_everything_is_real() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, EOS]])
    rows = supervised_rows(ids, None, ids, shift=True)
    assert rows.labels.tolist() == [6, 7, 9, EOS]
    assert rows.position.tolist() == [0, 1, 0, 1]
    assert len(valid_rows(ids, None)) == 6


@pytest.mark.parametrize("shift", [True, False])
def test_nothing_supervised_gives_no_rows(shift: bool) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, EOS]])
    rows = supervised_rows(ids, None, torch.full_like(ids, IGNORED), shift=shift)
    assert len(rows) == 0
    assert rows.per_sequence == (0, 0)
    assert rows.index.shape == rows.labels.shape == (0,)


def test_one_token_predicts_nothing() -> None:
    ids = torch.tensor([[5]])
    assert len(supervised_rows(ids, None, ids, shift=True)) == 0
    assert len(supervised_rows(ids, None, ids, shift=False)) == 1


def test_the_labels_given_are_not_written_to() -> None:
    ids, mask, labels = batch("left")
    before = labels.clone()
    for shift in (True, False):
        supervised_rows(ids, torch.zeros_like(mask), labels, shift=shift)
    assert torch.equal(labels, before)


@every_padding
def test_valid_rows_are_the_real_tokens(side: Side, width: int | None) -> None:
    ids, mask, _ = batch(side, width)
    rows = valid_rows(ids, mask)
    assert rows.token.tolist() == [token for sequence in SEQUENCES for token in sequence]
    assert rows.per_sequence == (5, 2, 7)
    assert set(rows.labels.tolist()) == {IGNORED}


def test_first_keeps_the_first_sequences() -> None:
    rows = supervised_rows(*batch("left"), shift=True)
    few = rows.first(2)
    assert said(few) == [row for row in said(rows) if row[0] < 2]
    assert few.per_sequence == rows.per_sequence[:2]
    assert len(few.host_position) == len(few)
    assert len(rows.first(0)) == 0
    assert said(rows.first(99)) == said(rows)


def test_to_moves_every_tensor_but_the_host_side() -> None:
    rows = supervised_rows(*batch("left"), shift=True).to("meta", non_blocking=True)
    for field in fields(Rows):
        value = getattr(rows, field.name)
        if isinstance(value, Tensor):
            assert value.device.type == ("cpu" if field.name == "host_position" else "meta")
    assert len(rows) == sum(rows.per_sequence)
    queries = sample_queries(rows, (1, 2, 3), most=2, seed=0, epoch=0).to("meta")
    assert {queries.position.device.type, queries.used.device.type, queries.flat.device.type} == {
        "meta"
    }
    assert len(queries) == sum(queries.per_sequence)


def test_keys_are_of_the_real_tokens_alone() -> None:
    keys = {
        example_keys(*batch(side, width)[:2]) for side in ("left", "right") for width in (7, 12)
    }
    assert len(keys) == 1
    found = keys.pop()
    assert len(set(found)) == 3
    alone = [example_keys(torch.tensor([sequence]), None)[0] for sequence in SEQUENCES]
    assert found == tuple(alone)
    small = example_keys(torch.tensor([SEQUENCES[0]], dtype=torch.int32), None)
    assert small == (alone[0],)


def test_keys_of_other_tokens_differ() -> None:
    keys = example_keys(torch.tensor([[5, 6, 7], [5, 7, 6], [6, 6, 7], [5, 6, 7]]), None)
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]
    assert len(example_keys(torch.tensor([[PAD, PAD]]), torch.tensor([[0, 0]]))) == 1


def test_a_batch_gives_rows_by_kind() -> None:
    ids, mask, labels = batch("right")
    supervised, valid = supervised_rows(ids, mask, labels, shift=True), valid_rows(ids, mask)
    whole = Batch({"input_ids": ids}, supervised, valid)
    assert whole.rows("supervised") is supervised
    assert whole.rows("valid") is valid
    with pytest.raises(LookupError, match="collated without valid rows"):
        Batch({"input_ids": ids}, supervised).rows("valid")


def test_a_batch_moves_as_one() -> None:
    ids, mask, labels = batch("right")
    supervised, keys = supervised_rows(ids, mask, labels, shift=True), example_keys(ids, mask)
    queries = sample_queries(supervised, keys, most=2, seed=0, epoch=0)
    moved = Batch({"input_ids": ids}, supervised, valid_rows(ids, mask), queries).to("meta")
    assert moved.inputs["input_ids"].device.type == "meta"
    assert moved.rows("valid").index.device.type == "meta"
    assert moved.queries is not None
    assert moved.queries.position.device.type == "meta"
    bare = Batch({"input_ids": ids}, supervised).to("meta")
    assert bare.valid is None
    assert bare.queries is None


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chosen", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_some_sequences_are_as_a_batch_of_their_own(
    side: Side, chosen: list[int], shift: bool
) -> None:
    ids, mask, labels = batch(side)
    columns = {"kind": ("a", "b", "c")}
    whole = Batch(
        {"input_ids": ids, "attention_mask": mask, "scale": torch.tensor(2.0)},
        supervised_rows(ids, mask, labels, shift=shift),
        valid_rows(ids, mask),
        draw=Draw(3, 1, example_keys(ids, mask)),
        columns=columns,
    )
    some = whole.only(chosen)
    ids, mask, labels = (t[chosen] for t in (ids, mask, labels))
    assert torch.equal(some.inputs["input_ids"], ids)
    assert some.inputs["scale"] == 2.0
    assert some.columns == {"kind": tuple(columns["kind"][k] for k in chosen)}
    assert some.draw == Draw(3, 1, example_keys(ids, mask))
    assert some.valid is not None
    for ours, theirs in (
        (some.supervised, supervised_rows(ids, mask, labels, shift=shift)),
        (some.valid, valid_rows(ids, mask)),
    ):
        for field in fields(Rows):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def test_sequences_that_do_not_count_have_no_rows() -> None:
    """In an evaluation the last ones may repeat others, to even out the ranks."""
    ids, mask, labels = batch("right")
    rows = supervised_rows(ids, mask, labels, shift=True).first(2)
    assert rows.only([1, 2], ids.shape[1]).per_sequence == (rows.per_sequence[1], 0)
    assert len(rows.only([2], ids.shape[1])) == 0
