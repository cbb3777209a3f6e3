"""Batches side by side, padded on the right to the longest: what a teacher reads in one go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from llm_distill.rows import Batch

TAKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""What batches that are joined may hold."""


def joined(batches: Sequence[Batch]) -> Batch:
    """The inputs and queries of several batches as those of one; its rows mean nothing.

    One batch is itself. Sequence k of batch i stands behind all sequences of the batches before it.
    """
    if len(batches) == 1:
        return batches[0]
    given = {name for batch in batches for name in batch.inputs}
    filled = [with_all(batch.inputs, given) for batch in batches]
    length = max(inputs["input_ids"].shape[1] for inputs in filled)
    inputs = {
        name: torch.cat([padded(one[name], (len(one[name]), length)) for one in filled])
        for name in filled[0]
    }
    queries = batches[0].queries
    if queries is not None:
        asked = [batch.queries.position for batch in batches if batch.queries is not None]
        places = max(position.shape[1] for position in asked)
        position = torch.cat([padded(one, (len(one), places)) for one in asked])
        queries = replace(queries, position=position)
    return replace(batches[0], inputs=inputs, queries=queries)


def with_all(inputs: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Inputs with those of the names, written out as models take them by default.

    A mask as well, unless positions alone say where packed examples begin: with a mask beside them,
    models would no longer keep these apart. What is padded behind them is another example then.

    Raises:
        ValueError: For inputs that nobody knows how to pad.
    """
    others = sorted({*inputs, *names} - {*TAKEN})
    if others:
        raise ValueError(
            f"a teacher in tensor parallelism, or once per step, reads {', '.join(TAKEN)}, and the "
            f"collator gave {', '.join(others)} as well; leave it out, or write shard: fsdp2 and "
            "once_per_step: false"
        )
    ids = inputs["input_ids"]
    found = {"input_ids": ids}
    if "attention_mask" in names or "position_ids" not in names:
        found["attention_mask"] = inputs.get("attention_mask", torch.ones_like(ids))
    if "position_ids" in names:
        counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        found["position_ids"] = inputs.get("position_ids", counted)
    if "token_type_ids" in names:
        found["token_type_ids"] = inputs.get("token_type_ids", torch.zeros_like(ids))
    return found


def parts(batches: Sequence[Batch]) -> Iterator[tuple[Batch, slice, int, int]]:
    """Each batch, its sequences among all of them, its query places and its length."""
    first = 0
    for batch in batches:
        sequences, length = batch.inputs["input_ids"].shape
        places = 0 if batch.queries is None else batch.queries.position.shape[1]
        yield batch, slice(first, first + sequences), places, length
        first += sequences


def part_of(states: Tensor, sequences: slice, length: int) -> Tensor:
    """States of one batch among several, `[B, T, D]`.

    Of a batch alone the very same tensor: gradients are asked for at states of the student.
    """
    if sequences == slice(0, len(states)) and length == states.shape[1]:
        return states
    return states[sequences, :length]


def padded(own: Tensor, sizes: tuple[int, int], *, fill: int = 0) -> Tensor:
    """`[B, T]` with zeros behind its columns, and whole rows of `fill` behind its rows.

    >>> padded(torch.tensor([[5, 6]]), (2, 3), fill=1)
    tensor([[5, 6, 0],
            [1, 1, 1]])
    """
    rows, columns = sizes[0] - own.shape[0], sizes[1] - own.shape[1]
    return F.pad(F.pad(own, (0, columns)), (0, 0, 0, rows), value=fill)
