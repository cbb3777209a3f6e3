"""Rows: which positions of a batch are supervised predictions, valid tokens, or sampled queries.

The one place that knows of the shift, of `-100` and of padding. Everything is made on the CPU
beside the collator (so the number of rows is known to the host and no `nonzero()` waits for a GPU)
and moves to the device with the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

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
    """

    index: Tensor
    labels: Tensor
    sequence: Tensor
    position: Tensor
    token: Tensor
    per_sequence: tuple[int, ...]
    host_position: Tensor

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
class Queries:
    """Sampled query positions of attention maps, the same for student and teacher.

    Attributes:
        position: `[B, R]`, places inside the padded sequences; unused places repeat a real one.
        used: `[B, R]`, which places count.
        per_sequence: How many places of each sequence count, on the host.
        flat: `[n]`, the places that count, in the flattened `[B * R]`.
    """

    position: Tensor
    used: Tensor
    per_sequence: tuple[int, ...]
    flat: Tensor

    def __len__(self) -> int:
        """n, known without asking the device."""
        return sum(self.per_sequence)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Queries:
        """The same queries on a device."""
        position, used, flat = (
            t.to(device, non_blocking=non_blocking) for t in (self.position, self.used, self.flat)
        )
        return replace(self, position=position, used=used, flat=flat)

    def flat_of(self, part: slice) -> Tensor:
        """The places that count among some columns, in the flattened `[B * columns]`: `[n']`."""
        if part == slice(None):
            return self.flat
        start, stop, _ = part.indices(self.position.shape[1])
        wanted = [
            sequence * (stop - start) + column
            for sequence, count in enumerate(self.per_sequence)
            for column in range(min(count, stop) - start)
        ]
        return torch.tensor(wanted, dtype=torch.long).to(self.flat.device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """A batch as models and terms see it.

    Attributes:
        inputs: What the models are called with.
        supervised: Rows that predict a label.
        valid: Every real token; None where no term asked for it.
        queries: Sampled query positions; None where no term asked for maps.
    """

    inputs: Mapping[str, Tensor]
    supervised: Rows
    valid: Rows | None = None
    queries: Queries | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(
            {key: value.to(device) for key, value in self.inputs.items()},
            self.supervised.to(device),
            None if self.valid is None else self.valid.to(device),
            None if self.queries is None else self.queries.to(device, non_blocking=True),
        )

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
        measure: Also return the evaluation sums (perplexities, KL, agreement).
        logits: Also return the student's full logits, for `compute_metrics`.
    """

    progress: float
    shares: Tensor
    measure: bool = False
    logits: bool = False


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
    return _rows(input_ids, targets, targets != IGNORED)


def valid_rows(input_ids: Tensor, attention_mask: Tensor | None) -> Rows:
    """Every real token: `[B, T] x2 -> N rows`, labels `-100`."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return _rows(input_ids, torch.full_like(input_ids, IGNORED), real != 0)


def _rows(input_ids: Tensor, targets: Tensor, chosen: Tensor) -> Rows:
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
    )


def example_keys(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, ...]:
    """A number for each example from its real tokens: the same in any batch or epoch."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = (ids[keep != 0] for ids, keep in zip(input_ids, mask, strict=True))
    return tuple(zlib.crc32(ids.to(torch.int64).contiguous().numpy().tobytes()) for ids in real)


def sample_queries(
    rows: Rows, keys: Sequence[int], *, most: int | None, seed: int, epoch: int
) -> Queries:
    """Draw query positions of each sequence, from (seed, example, epoch) alone.

    Args:
        rows: Among these; only their host side is read.
        keys: `example_keys` of the batch.
        most: Queries per sequence at most; None takes all rows.
        seed: Of the run.
        epoch: New queries in each epoch.

    Returns:
        Queries in ascending position. The mean over those of one sequence is unbiased for the mean
        over all its rows; longer sequences count no more than `most`.
    """
    drawn: list[Tensor] = []
    start = 0
    for count, key in zip(rows.per_sequence, keys, strict=True):
        places = rows.host_position[start : start + count]
        if most is not None and count > most:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key} {epoch}".encode()))
            places = places[torch.randperm(count, generator=generator)[:most].sort().values]
        drawn.append(places)
        start += count
    return _queries(drawn)


def _queries(drawn: Sequence[Tensor]) -> Queries:
    """Ragged positions padded to one width of at least one place."""
    width = max([1, *(len(places) for places in drawn)])
    position = torch.zeros(len(drawn), width, dtype=torch.long)
    used = torch.zeros(len(drawn), width, dtype=torch.bool)
    for row, places in enumerate(drawn):
        position[row, : len(places)] = places
        position[row, len(places) :] = places[0] if len(places) else 0
        used[row, : len(places)] = True
    flat = used.flatten().nonzero()[:, 0]
    return Queries(position, used, tuple(len(places) for places in drawn), flat)
