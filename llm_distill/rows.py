"""Rows: which positions of a batch are supervised predictions, valid tokens, or sampled queries.

The one place that knows of the shift, of `-100` and of padding. Everything is made on the CPU
beside the collator (so the number of rows is known to the host and no `nonzero()` waits for a GPU)
and moves to the device with the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llm_distill.coded import Coded
from llm_distill.keys import Examples
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.queries import Queries

IGNORED = -100
"""The label of transformers that means: not a target."""

RowKind = Literal["supervised", "valid"]
"""Rows that predict a label, or all real tokens."""


@dataclass(frozen=True)
class Rows:
    """N positions of a batch, ordered by sequence and position.

    Attributes:
        index: `[N]`, places in the flattened `[B * T]` batch.
        labels: `[N]`, the token each row predicts, `-100` where it predicts nothing.
        sequence: `[N]`, which sequence.
        position: `[N]`, place inside the padded sequence.
        token: `[N]`, the input token there.
        per_sequence: How many rows each sequence has, on the host.
        host_position: `position` again, always on the CPU: queries are drawn there.
        starts: Place of each sequence's first real token, on the host; () where all are 0.
    """

    index: Tensor
    labels: Tensor
    sequence: Tensor
    position: Tensor
    token: Tensor
    per_sequence: tuple[int, ...]
    host_position: Tensor
    starts: tuple[int, ...] = ()

    def __len__(self) -> int:
        """N, known without asking the device."""
        return len(self.index)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Rows:
        """The same rows on a device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: str | None = None) -> Rows:
        """The same rows in page-locked memory, for the DataLoader."""
        del device
        return self._each(Tensor.pin_memory)

    def first(self, sequences: int) -> Rows:
        """The rows of the first sequences only."""
        kept = sum(self.per_sequence[:sequences])
        few = self._each(lambda t: t[:kept])
        return replace(
            few, per_sequence=self.per_sequence[:sequences], host_position=self.host_position[:kept]
        )

    def at(self, places: Tensor) -> Rows:
        """Some of the rows: `[n]`, ascending, on the CPU."""
        there = places.to(self.index.device, non_blocking=True)
        few = self._each(lambda t: t.index_select(0, there))
        ends = torch.tensor(self.per_sequence, dtype=torch.long).cumsum(0)
        counts = torch.searchsorted(places, ends).diff(prepend=torch.zeros(1, dtype=torch.long))
        return replace(
            few,
            per_sequence=tuple(counts.tolist()),
            host_position=self.host_position.index_select(0, places),
        )

    def only(self, sequences: Sequence[int], length: int) -> Rows:
        """The rows of some sequences, which become a batch of their own.

        Args:
            sequences: Ascending.
            length: Tokens of a padded sequence.
        """
        counts = [self.per_sequence[k] if k < len(self.per_sequence) else 0 for k in sequences]
        chosen = torch.zeros(max([*sequences, len(self.per_sequence)]) + 1, dtype=torch.bool)
        chosen[list(sequences)] = True
        sizes = torch.tensor(self.per_sequence, dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        few = self.at(chosen[owner].nonzero()[:, 0])
        new = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        sequence = new.to(self.index.device, non_blocking=True)
        starts = tuple(self.starts[k] for k in sequences) if self.starts else ()
        index = sequence * length + few.position
        return replace(
            few, index=index, sequence=sequence, per_sequence=tuple(counts), starts=starts
        )

    def _each(self, move: Callable[[Tensor], Tensor]) -> Rows:
        """Apply a function to every tensor."""
        return replace(
            self,
            index=move(self.index),
            labels=move(self.labels),
            sequence=move(self.sequence),
            position=move(self.position),
            token=move(self.token),
        )


@dataclass(frozen=True)
class Draw:
    """What random choices of rows follow from, the same on any rank and after a resumption.

    Attributes:
        seed: Of the run.
        epoch: New choices in each epoch.
        keys: `example_keys` of the batch.
    """

    seed: int = 0
    epoch: int = 0
    keys: tuple[int, ...] = ()

    def generator(self, *what: object) -> torch.Generator:
        """Random numbers for one purpose."""
        text = " ".join(str(part) for part in (self.seed, *what, self.epoch))
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))


@dataclass(frozen=True)
class Batch:
    """A batch as models and terms see it.

    Attributes:
        inputs: What the models are called with; the student alone where there is `theirs`.
        supervised: Rows that predict a label.
        valid: Every real token; None where no term asked for it.
        queries: Sampled query positions; None where no term asked for maps.
        draw: What random choices of its rows follow from.
        theirs: The same sequences in the teacher's own tokens, where its tokenizer is another.
        examples: Their names, by which a cache finds them; None where nobody looks them up.
        told: What a cache has of the supervised rows, where it was read with the batch.
        stored: Hidden states that it has, by layer, of the supervised or valid rows.
        columns: What the data say of each sequence besides, as text, on the host.
        picked: What was chosen already (`llm_distill.picks`).
    """

    inputs: Mapping[str, Tensor]
    supervised: Rows
    valid: Rows | None = None
    queries: Queries | None = None
    draw: Draw = field(default_factory=Draw)
    theirs: Batch | None = None
    examples: Examples | None = None
    told: TopK | Counts | Tensor | None = None
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stored: Mapping[int, Coded] | None = None
    picked: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(
            {key: value.to(device) for key, value in self.inputs.items()},
            self.supervised.to(device),
            None if self.valid is None else self.valid.to(device),
            None if self.queries is None else self.queries.to(device, non_blocking=True),
            self.draw,
            None if self.theirs is None else self.theirs.to(device),
            self.examples,
            None if self.told is None else self.told.to(device),
            self.columns,
            self.stored and {k: kept.to(device) for k, kept in self.stored.items()},
        )

    def only(self, sequences: Sequence[int]) -> Batch:
        """Some sequences as a batch of their own; queries are left out.

        Args:
            sequences: Ascending.
        """
        ids = self.inputs["input_ids"]
        size, length = ids.shape[:2]
        chosen = torch.tensor(list(sequences), device=ids.device)
        inputs = {
            name: value.index_select(0, chosen) if value.shape[:1] == (size,) else value
            for name, value in self.inputs.items()
        }
        keys = tuple(self.draw.keys[k] for k in sequences if k < len(self.draw.keys))
        return Batch(
            inputs,
            self.supervised.only(sequences, length),
            None if self.valid is None else self.valid.only(sequences, length),
            draw=replace(self.draw, keys=keys),
            examples=None if self.examples is None else self.examples.only(sequences),
            columns={
                name: tuple(values[k] for k in sequences) for name, values in self.columns.items()
            },
        )

    @property
    def for_teacher(self) -> Batch:
        """The batch as the teacher reads it."""
        return self if self.theirs is None else self.theirs

    def rows(self, kind: RowKind) -> Rows:
        """The rows of one kind."""
        if kind == "supervised":
            return self.supervised
        if self.valid is None:
            raise LookupError(
                "this batch was collated without valid rows; no term announced that it needs them"
            )
        return self.valid


@dataclass(frozen=True)
class Step:
    """What is known before the forward of a step.

    Attributes:
        progress: Share of the training that is done, in [0, 1].
        shares: `[K]` fp32 on the device: weight of each term x data-parallel ranks / items of the
            whole step.
        measure: Also return the evaluation sums (perplexities, KL, agreement); NaN for those that
            need the teacher's logits where it does not give them.
        logits: Also return the student's full logits, for `compute_metrics`.
        alone: Whether the student's blocks learn alone, from states of the teacher, and no term
            counts but those that let them.
        rehearsal: Terms are measured on a step that is taken afterwards: what they keep stays.
        layer: Return the norm of each term's gradient at this hidden state of the student instead
            of a loss; None: nowhere.
    """

    progress: float
    shares: Tensor
    measure: bool = False
    logits: bool = False
    alone: bool = False
    rehearsal: bool = False
    layer: int | None = None


def supervised_rows(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, *, shift: bool
) -> Rows:
    """Rows that predict a label: `[B, T] x3 -> N rows`.

    Args:
        input_ids: Tokens.
        attention_mask: 1 at real tokens; None: all are real.
        labels: Targets beside their own token, `-100` where there is none.
        shift: Whether position t predicts the label of t + 1 (causal models) or of t (masked ones).
    """
    targets = torch.full_like(labels, IGNORED)
    if shift:
        targets[:, :-1] = labels[:, 1:]
    else:
        targets = labels.clone()
    if attention_mask is not None:
        targets[attention_mask == 0] = IGNORED
    return _rows(input_ids, targets, targets != IGNORED, attention_mask)


def valid_rows(input_ids: Tensor, attention_mask: Tensor | None) -> Rows:
    """Every real token: `[B, T] x2 -> N rows`, labels `-100`."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return _rows(input_ids, torch.full_like(input_ids, IGNORED), real != 0, attention_mask)


def _rows(input_ids: Tensor, targets: Tensor, chosen: Tensor, mask: Tensor | None) -> Rows:
    """The chosen positions as rows."""
    sequence, position = chosen.nonzero(as_tuple=True)
    index = sequence * input_ids.shape[1] + position
    return Rows(
        index=index,
        labels=targets.flatten()[index],
        sequence=sequence,
        position=position,
        token=input_ids.flatten()[index],
        per_sequence=tuple(chosen.sum(1).tolist()),
        host_position=position,
        starts=() if mask is None else tuple((mask != 0).int().argmax(1).tolist()),
    )


def example_keys(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, ...]:
    """A number for each example from its real tokens: the same in any batch or epoch."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = (ids[keep != 0] for ids, keep in zip(input_ids, mask, strict=True))
    return tuple(zlib.crc32(ids.to(torch.int64).contiguous().numpy().tobytes()) for ids in real)
