"""Rows whose loss is no number: counted on the device, told with sample and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_distill.losses.scoring import faulty

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_distill.rows import Rows

CONTEXT = 8
"""Input tokens that are told, up to the row's own."""

FIELDS = ("count", "term", "sequence", "position", "label")


def find(values: Tensor, rows: Rows, input_ids: Tensor) -> Tensor:
    """How many rows are at fault, and where the first is, without asking the device.

    Args:
        values: `[K, N]`, of the terms that are row-wise on logits.
        rows: The N rows.
        input_ids: `[B, T]`.

    Returns:
        `FIELDS` and the last `CONTEXT` input tokens of the first row, int64; zeros for no fault.
    """
    found = torch.zeros(len(FIELDS) + CONTEXT, dtype=torch.int64, device=input_ids.device)
    if not len(rows) or not len(values):
        return found
    bad = faulty(values)
    first = bad.long().argmax().unsqueeze(0)  # of several, argmax is documented to take the first
    term = faulty(values.index_select(1, first).T).long().argmax().unsqueeze(0)
    sequence, position = rows.sequence.index_select(0, first), rows.position.index_select(0, first)
    steps = torch.arange(1 - CONTEXT, 1, device=input_ids.device)
    places = (position + steps).clamp_min(0)
    tokens = input_ids.index_select(0, sequence)[0].index_select(0, places)
    label = rows.labels.index_select(0, first)
    where = torch.cat([bad.sum().unsqueeze(0), term, sequence, position, label, tokens])
    return torch.where(bad.any(), where, found)


@dataclass(frozen=True)
class Fault:
    """The first row at fault of one rank."""

    rank: int
    step: int
    count: int
    term: str
    sequence: int
    position: int
    label: int
    tokens: tuple[int, ...]


class Faults:
    """Counts rows at fault on the device and keeps the first, until somebody asks.

    Args:
        names: Of the terms whose values `find` looked at, in their order.
        device: Where the counter lives.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = tuple(names), device
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self._kept = torch.zeros(1 + len(FIELDS) + CONTEXT, dtype=torch.int64, device=self.device)

    def add(self, found: Tensor, step: int) -> None:
        """What `find` found in a micro-batch of a step."""
        count = self._kept[1] + found[0]
        new = torch.cat([found.new_full((1,), step), found])
        self._kept = torch.where(self._kept[1] > 0, self._kept, new)
        self._kept[1] = count

    def check(self, gather: Callable[[Tensor], Tensor], decode: Callable[..., str] | None) -> None:
        """Raise if any rank has seen a fault; asks the device.

        Args:
            gather: Concatenates over ranks.
            decode: From token ids to text, where there is a tokenizer.

        Raises:
            FloatingPointError: On all ranks alike, with the first row of the first such rank.
        """
        ranks = gather(self._kept.unsqueeze(0)).tolist()
        self.reset()
        faults = [self._read(rank, kept) for rank, kept in enumerate(ranks) if kept[1]]
        if faults:
            raise FloatingPointError(_message(faults, decode))

    def _read(self, rank: int, kept: list[int]) -> Fault:
        """One rank's numbers by their names."""
        step, count, term, sequence, position, label, *tokens = kept
        told = tuple(tokens[-1 - min(position, CONTEXT - 1) :])
        return Fault(rank, step, count, self.names[term], sequence, position, label, told)


def _message(faults: Sequence[Fault], decode: Callable[..., str] | None) -> str:
    """What was found, where, and what to do."""
    first = faults[0]
    total = sum(fault.count for fault in faults)
    text = "" if decode is None else f" ({decode(list(first.tokens))!r})"
    return (
        f"{total} row{'s' if total > 1 else ''} had a loss that is no number, or infinite. The "
        f"first: {first.term} at step {first.step} on rank {first.rank}, sequence {first.sequence} "
        f"of its micro-batch, position {first.position}, which predicts token {first.label} after "
        f"{list(first.tokens)}{text}. Such rows were left out of loss and gradient. Either a logit "
        "is NaN or +inf (a model in fp16 that overflows: load it in bf16 or fp32), or one model "
        "forbids (-inf) a token to which the other gives mass: write a loss that stays finite, "
        "such as jsd or skew_forward_kl"
    )
