"""Which rows a term on hidden states reads, and what of them makes an item: token, sequence, pool.

Everything is decided on the host, from the rows' host side alone, so that the number of items is
known before the models run and nothing waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from llm_distill.losses.needs import Items
from llm_distill.losses.softmax import wide
from llm_distill.rows import Batch, RowKind, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Pick:
    """A choice of rows, and how they are grouped before a loss compares them.

    Attributes:
        rows: Among which.
        items: `token`: each row is an item and all rows of the batch are one group; `sequence`:
            each sequence is an item, its rows are a group; `pooled`: each sequence is an item, the
            mean of its rows, and all sequences of the batch are one group.
        skip: Real tokens at the start of every sequence that are left out: attention sinks, whose
            states are many times longer than all others.
        most: Members of a group at most, drawn anew in each epoch; None: all.
        least: Members of a group below which it is left out, and counted as such.
    """

    rows: RowKind = "supervised"
    items: Items = "token"
    skip: int = 0
    most: int | None = None
    least: int = 1


@dataclass(frozen=True)
class Picked:
    """What one batch has of a choice.

    Attributes:
        rows: The chosen rows, of the groups that are large enough.
        items: How many items those groups stand for, before any was drawn.
        skipped: Groups that were left out because they are too small.
        groups: Rows of each group, on the host; `pooled` has one for each sequence.
        pooled: Whether each group becomes one member, its mean.
        share: Items that each member of a group stands for.
        theirs: The same items among the teacher's own tokens, where its tokenizer is another.
    """

    rows: Rows
    items: int
    skipped: int
    groups: tuple[int, ...]
    pooled: bool
    share: tuple[float, ...]
    theirs: Picked | None = None

    @property
    def for_teacher(self) -> Picked:
        """What is gathered from the teacher's states."""
        return self if self.theirs is None else self.theirs

    def gather(self, states: Tensor) -> Tensor:
        """Hidden states of the chosen rows as members of groups: `[N, D] -> [n, D]`."""
        if not self.pooled:
            return states
        states = wide(states)
        sizes = torch.tensor(self.groups, dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sizes, owner = (t.to(states.device, non_blocking=True) for t in (sizes, owner))
        sums = states.new_zeros(len(sizes), states.shape[-1]).index_add(0, owner, states)
        return sums / sizes.unsqueeze(-1)

    def total(
        self, loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
    ) -> Tensor:
        """The loss over all items: `[n, Ds], [n, Dt] -> []`, 0 with a graph for none.

        Each group is compared by itself, and its mean counts as often as it has items.
        """
        sizes = (len(student),) if self.pooled else self.groups
        if len(sizes) <= 1:
            return loss(student, teacher).sum() * sum(self.share[:1])
        parts = zip(student.split(sizes), teacher.split(sizes), self.share, strict=True)
        return torch.stack([loss(s, t).sum() * share for s, t, share in parts]).sum()


def pairs_texts(choice: Pick) -> bool:
    """Whether items are whole texts, so that both models may cut them into tokens of their own.

    >>> pairs_texts(Pick("valid", "pooled")), pairs_texts(Pick("valid"))
    (True, False)
    """
    return choice.items == "pooled" and choice.rows == "valid"


def pick(batch: Batch, choice: Pick) -> Picked:
    """The rows of a choice in a batch; a second call gives the same."""
    if choice not in batch.picked:
        batch.picked[choice] = _pick(batch, choice)
    return cast("Picked", batch.picked[choice])


def _pick(batch: Batch, choice: Pick) -> Picked:
    """The rows of a choice in a batch."""
    if batch.theirs is not None and not pairs_texts(choice):
        raise LookupError(
            f"{choice.rows} rows as items {choice.items} are asked for, and student and teacher "
            "have tokens of their own, which do not pair; pick valid rows, pooled"
        )
    if choice.items == "pooled":
        return _pooled(batch, choice)
    rows = _after(batch.rows(choice.rows), choice.skip)
    if choice.items == "sequence":
        return _each(rows, batch, choice)
    n = len(rows)
    if n < choice.least:
        return Picked(rows.at(_NONE), 0, int(n > 0), (0,), pooled=False, share=(0.0,))
    if choice.most is not None and n > choice.most:
        rows = rows.at(_some(n, choice.most, batch, "tokens", *batch.draw.keys))
    share = n / len(rows) if n else 0.0
    return Picked(rows, n, 0, (len(rows),), pooled=False, share=(share,))


def _each(rows: Rows, batch: Batch, choice: Pick) -> Picked:
    """Each sequence a group, its mean an item."""
    places, groups, skipped, start = [], [], 0, 0
    for sequence, count in enumerate(rows.per_sequence):
        drawn = torch.arange(count)
        if choice.most is not None and count > choice.most:
            drawn = _some(count, choice.most, batch, "sequence", _key(batch, sequence))
        if len(drawn) >= choice.least and count:
            places.append(start + drawn)
            groups.append(len(drawn))
        else:
            skipped += int(count > 0)
        start += count
    chosen = rows.at(torch.cat(places) if places else _NONE)
    share = tuple(1.0 / size for size in groups)
    return Picked(
        chosen, len(groups), skipped, tuple(groups) or (0,), pooled=False, share=share or (0.0,)
    )


def _pooled(batch: Batch, choice: Pick) -> Picked:
    """Each sequence one member of one group; one that is empty for either model is none."""
    batches = [batch] if batch.theirs is None else [batch, batch.theirs]
    sides = [_after(side.rows(choice.rows), choice.skip) for side in batches]
    counts = zip(*(rows.per_sequence for rows in sides), strict=True)
    full = [sequence for sequence, here in enumerate(counts) if all(here)]
    few = len(full) < choice.least
    kept = [] if few else full
    if choice.most is not None and len(kept) > choice.most:
        drawn = _some(len(kept), choice.most, batch, "pooled", *batch.draw.keys)
        kept = [full[int(k)] for k in drawn]
    items, skipped = (0, int(bool(full))) if few else (len(full), 0)
    share = items / len(kept) if kept else 0.0
    own, *others = (
        Picked(chosen, items, skipped, groups, pooled=True, share=(share,))
        for chosen, groups in (_whole(rows, kept) for rows in sides)
    )
    return replace(own, theirs=others[0]) if others else own


def _whole(rows: Rows, sequences: Sequence[int]) -> tuple[Rows, tuple[int, ...]]:
    """All rows of some sequences, and how many each has."""
    counts = rows.per_sequence
    ends = torch.tensor(counts, dtype=torch.long).cumsum(0).tolist()
    places = [torch.arange(ends[k] - counts[k], ends[k]) for k in sequences]
    return rows.at(torch.cat(places) if places else _NONE), tuple(counts[k] for k in sequences)


def _after(rows: Rows, skip: int) -> Rows:
    """The rows without those on the first real tokens of each sequence."""
    if not skip:
        return rows
    counts = torch.tensor(rows.per_sequence, dtype=torch.long)
    starts = rows.starts[: len(counts)] or (0,) * len(counts)
    first = torch.tensor(starts, dtype=torch.long)
    rank = rows.host_position - torch.repeat_interleave(first, counts)
    return rows.at((rank >= skip).nonzero()[:, 0])


def _some(count: int, most: int, batch: Batch, *what: object) -> Tensor:
    """`most` of `count` places, ascending, from (seed, examples, epoch) alone."""
    generator = batch.draw.generator(*what)
    return torch.randperm(count, generator=generator)[:most].sort().values


def _key(batch: Batch, sequence: int) -> int:
    """Of one example; its place where the batch has no keys."""
    keys = batch.draw.keys
    return keys[sequence] if sequence < len(keys) else sequence


_NONE = torch.empty(0, dtype=torch.long)
