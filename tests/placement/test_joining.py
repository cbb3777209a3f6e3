"""Batches side by side are read as they are alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from llm_distill.binding import make_batch
from llm_distill.capture import Reader
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.objectives import QueryPlan
from llm_distill.placement.joining import TAKEN, joined, parts, with_all
from llm_distill.rows import Batch
from llm_distill.signals import Factored, Request
from tests import tiny

ALL = Request(
    logits=True, hidden=frozenset({0, 1, 2}), heads=frozenset({1, 2}), relations=frozenset({2})
)


class Left:
    """Pads on the left."""

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        made = Collator(pad_token_id=0)(examples)
        shifts = (made["attention_mask"] == 0).sum(1).tolist()
        return {
            key: torch.stack([row.roll(k) for row, k in zip(value, shifts, strict=True)])
            for key, value in made.items()
        }


def batches(side: str = "right", *, shift: bool = True) -> list[Batch]:
    """Of one, three and two sequences; the second has no supervised token."""
    inner: Any = Collator(pad_token_id=0) if side == "right" else Left()
    collate = RowCollator(inner, shift=shift, valid=True)
    data = tiny.rows(8, empty=(1, 2, 3))
    groups = ([0], [1, 2, 3], [4, 5])
    plan = QueryPlan(4, "valid")
    return [make_batch(collate([data[k] for k in g]), plan, seed=0, epoch=0) for g in groups]


@pytest.mark.parametrize("family", [*tiny.MODELS, "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_each_batch_is_as_it_would_be_alone(family: str, side: str) -> None:
    model = tiny.bert() if family == "bert" else tiny.MODELS[family]()
    given = batches(side, shift=family != "bert")
    with torch.no_grad():
        reader = Reader(model, ALL, "m")
        together = reader.read_all(given)
        for batch, found in zip(given, together, strict=True):
            alone = reader.read(batch)
            real = batch.inputs["attention_mask"].bool()
            for layer in ALL.hidden:
                close(found.states[layer][real], alone.states[layer][real])
            for layer in ALL.heads:
                assert batch.queries is not None
                close(*(s.attention[layer].maps(batch.queries) for s in (found, alone)))
            whole = found.attention[2], alone.attention[2]
            for name in ("key", "value", "whole_query"):
                one, other = (getattr(heads, name).transpose(1, 2)[real] for heads in whole)
                close(one, other)
            assert isinstance(found.distribution, Factored)
            assert len(found.distribution) == len(batch.supervised)
            close(found.distribution.logits(slice(None)), alone.whole.logits(slice(None)))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_packed_examples_stay_apart() -> None:
    """They come with positions that begin anew, and without a mask: a mask would join them."""
    collate = RowCollator(DataCollatorWithFlattening(), shift=True, valid=False)
    data = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tiny.rows(7)]
    groups = (data[:2], data[2:5], data[5:])
    given = [make_batch(collate(group), None, seed=0, epoch=0) for group in groups]
    assert all("attention_mask" not in batch.inputs for batch in given)
    with torch.no_grad():
        reader = Reader(tiny.llama("teacher"), Request(logits=True), "m")
        for batch, found in zip(given, reader.read_all(given), strict=True):
            expected = reader.read(batch).whole.logits(slice(None))
            close(found.whole.logits(slice(None)), expected)
        joint = reader.read(_as_one(given[1])).whole.logits(slice(None))
        assert not torch.allclose(joint, reader.read(given[1]).whole.logits(slice(None)), atol=1e-3)


def _as_one(batch: Batch) -> Batch:
    """The same with a mask, as if it were one example: what must not happen."""
    ids = batch.inputs["input_ids"]
    return replace(batch, inputs={**batch.inputs, "attention_mask": torch.ones_like(ids)})


def test_the_head_is_the_same_object_for_all() -> None:
    """Gathered once, where it lies in pieces."""
    found = Reader(tiny.llama("teacher"), Request(logits=True), "m").read_all(batches())
    heads = [s.distribution.head for s in found if isinstance(s.distribution, Factored)]
    assert len(heads) == 3
    assert heads[0] is heads[1] is heads[2]


def test_one_batch_is_itself() -> None:
    (first, *_), none = batches(), [slice(0, 1), slice(1, 4), slice(4, 6)]
    assert joined([first]) is first
    assert [sequences for _, sequences, _, _ in parts(batches())] == none


def test_what_models_take_by_default_is_written_out() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    found = with_all({"input_ids": ids}, TAKEN)
    assert found["attention_mask"].tolist() == ids.tolist()
    packed = {"input_ids": ids, "position_ids": ids}
    assert "attention_mask" not in with_all(packed, packed)
    assert found["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert not found["token_type_ids"].any()
    assert set(with_all({"input_ids": ids}, ())) == {"input_ids", "attention_mask"}


def test_what_nobody_knows_how_to_pad_is_refused() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="the collator gave pixel_values as well; leave it out"):
        with_all({"input_ids": ids, "pixel_values": ids}, ())
