"""Whom an item is told apart from: the items of all ranks and of earlier steps, less its likes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llm_distill.losses.contrastive import info_nce

if TYPE_CHECKING:
    from llm_distill.picks import Picked
    from llm_distill.rows import Batch

PADDING = -1
"""Label, sequence and position of a place without an item."""


class Ranks(NamedTuple):
    """Who runs beside this process.

    Attributes:
        own: This one's number.
        world: How many there are.
    """

    own: int = 0
    world: int = 1

    @classmethod
    def now(cls) -> Ranks:
        """Those of the default process group, where there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @torch.no_grad()
    def gather(self, values: Tensor, most: int, fill: float = 0.0) -> Tensor:
        """Everyone's, each filled up to `most` so that no sizes are exchanged.

        `[n, ...] -> [R * most, ...]`, without a gradient; `[n, ...]` where there is one rank.
        """
        values = values.detach()
        if self.world == 1:
            return values
        missing = values.new_full((most - len(values), *values.shape[1:]), fill)
        mine = torch.cat([values, missing])
        everyone = values.new_empty(self.world * most, *values.shape[1:])
        dist.all_gather_into_tensor(everyone, mine)
        return everyone


class Facts(NamedTuple):
    """What is known of items besides their embeddings: `[N]` each, whole numbers.

    Attributes:
        label: Items with one label are no negatives of each other: the token, or a number for the
            text. `PADDING` where there is no item.
        sequence: Which one, among those of all ranks.
        position: In it.
    """

    label: Tensor
    sequence: Tensor
    position: Tensor

    @classmethod
    def of(cls, picked: Picked, batch: Batch, items: str) -> Facts:
        """Those of a batch: tokens, or a number for the text of each sequence."""
        rows = picked.rows
        if items == "token":
            return cls(rows.token, rows.sequence, rows.position)
        chosen = [place for place, count in enumerate(rows.per_sequence) if count]
        keys = torch.tensor([batch.draw.keys[place] for place in chosen], dtype=torch.long)
        sequence = torch.tensor(chosen, dtype=torch.long)
        there = torch.stack([keys, sequence]).to(rows.index.device, non_blocking=True)
        return cls(there[0], there[1], torch.zeros_like(there[1]))

    def on(self, ranks: Ranks) -> Facts:
        """The same, with numbers of sequences that no other rank has."""
        return self._replace(sequence=self.sequence + (ranks.own << 32))

    def gather(self, ranks: Ranks, most: int) -> Facts:
        """Everyone's."""
        return Facts(*ranks.gather(torch.stack(self, -1), most, fill=PADDING).unbind(-1))

    def blocked(self, candidates: Facts, apart: int) -> Tensor:
        """Which candidates are no negatives of an item, the item itself among them: `[N, M]`.

        Padding, candidates with the item's label, and where `apart` is not 0 those at most so many
        tokens away in its own sequence.
        """
        found = likes(self.label, candidates.label)
        if apart:
            beside = (self.position[:, None] - candidates.position).abs() <= apart
            found = found | ((self.sequence[:, None] == candidates.sequence) & beside)
        return found


def likes(own: Tensor, others: Tensor) -> Tensor:
    """Where a candidate has an item's label, or is none: `[N], [M] -> [N, M]`.

    >>> likes(torch.tensor([4, 5]), torch.tensor([5, PADDING, 6]))
    tensor([[False,  True, False],
            [ True,  True, False]])
    """
    return (own[:, None] == others) | (others == PADDING)


@dataclass(frozen=True)
class Crowd:
    """This rank's items among everyone's.

    Attributes:
        own: Embeddings of length 1, the student's and the teacher's: `[n, K, 2, P]`.
        everyone: Those of all ranks, without a gradient: `[M, K, 2, P]`.
        hidden: Which of everyone, and of a queue behind them, are no candidates: `[n, M + Q]`.
        waiting: The queue's: `[K, Q, P]`.
        ranks: Whose they are; each has M / R places.
        temperature: What cosines are divided by.
    """

    own: Tensor
    everyone: Tensor
    hidden: Tensor
    waiting: Tensor
    ranks: Ranks
    temperature: float

    @property
    def start(self) -> int:
        """Where this rank's items begin."""
        return self.ranks.own * self._places

    @property
    def _places(self) -> int:
        """Of one rank."""
        return len(self.everyone) // self.ranks.world

    def losses(self, pair: int) -> Tensor:
        """InfoNCE of this rank's items, with their gradient as anchors and as candidates: `[n]`."""
        own, everyone, start = self.own[:, pair], self.everyone[:, pair], self.start
        live = torch.cat([everyone[:start], own, everyone[start + len(own) :]])
        return info_nce(
            *own.unbind(1),
            temperature=self.temperature,
            candidates=(live[:, 0], live[:, 1]),
            offset=start,
            queue=self.waiting[pair],
            blocked=self.hidden,
        )

    @torch.no_grad()
    def found(self, pair: int) -> tuple[Tensor, Tensor]:
        """Logs of what both softmaxes are divided by, and how many students found their teacher.

        Returns:
            `[n, 2]`; `[]`, those that have no other teacher as near.
        """
        ours, theirs = self._sides(self.own, pair)
        students, teachers = self._sides(self.everyone, pair)
        teachers = torch.cat([teachers, self.waiting[pair]])
        forth = self._scores(ours, teachers, self.hidden)
        back = self._scores(theirs, students, self.hidden[:, : len(students)])
        right = forth.gather(1, self.start + torch.arange(len(ours), device=ours.device)[:, None])
        sums = torch.stack([forth.logsumexp(1), back.logsumexp(1)], 1)
        return sums, ((forth >= right).sum(1) == 1).sum()

    def owed(self, pair: int, sums: Tensor, share: Tensor) -> Tensor:
        """0, with the gradient that the other ranks' items owe to this rank's as candidates: `[]`.

        With it a rank has the whole gradient of its own embeddings when its forward is done, and no
        backward waits for another rank.

        Args:
            pair: Of layers.
            sums: What everyone found, `[M, 2]`.
            share: What everyone's values are multiplied by, `[M]`; 0 where there is no item.
        """
        ours, theirs = self._sides(self.own, pair)
        students, teachers = self._sides(self.everyone, pair)
        hidden = self.hidden[:, : len(students)].mT
        forth = self._pull(students, theirs, sums[:, 0], share, hidden)
        back = self._pull(teachers, ours, sums[:, 1], share, hidden)
        value = 0.5 * ((theirs * forth).sum() + (ours * back).sum())
        return value - value.detach()

    @torch.no_grad()
    def _pull(
        self, anchors: Tensor, own: Tensor, sums: Tensor, share: Tensor, hidden: Tensor
    ) -> Tensor:
        """Gradient of others' cross-entropies for own candidates: `[n, P]`."""
        other = torch.ones_like(share)
        other[self.start : self.start + self._places] = 0.0
        chance = (self._scores(anchors, own, hidden) - sums[:, None]).exp()
        return (chance * (share * other)[:, None]).mT @ anchors / self.temperature

    def _scores(self, anchors: Tensor, candidates: Tensor, hidden: Tensor) -> Tensor:
        """Cosines over the temperature, -inf where hidden: `[N, P], [M, P], [N, M] -> [N, M]`."""
        return (anchors @ candidates.mT / self.temperature).masked_fill(hidden, -torch.inf)

    def _sides(self, embeddings: Tensor, pair: int) -> tuple[Tensor, Tensor]:
        """Students' and teachers'."""
        return embeddings[:, pair, 0], embeddings[:, pair, 1]


class Queue(nn.Module):
    """The teacher's embeddings of the last items, first in first out; the same on all ranks.

    Attributes:
        vectors: `[K, Q, P]`, for K pairs of layers.
        label: `[Q]`, `PADDING` where nothing has been put yet.
        seen: How many items ever came, `[]`.

    Source: He et al. 2019 (MoCo), arXiv 1911.05722, section 3.2.
    """

    def __init__(self, pairs: int, size: int, width: int) -> None:
        self.vectors: Tensor
        self.label: Tensor
        self.seen: Tensor
        super().__init__()
        self.register_buffer("vectors", torch.zeros(pairs, size, width))
        self.register_buffer("label", torch.full((size,), PADDING))
        self.register_buffer("seen", torch.tensor(0))

    @torch.no_grad()
    def push(self, vectors: Tensor, label: Tensor) -> None:
        """Put items in, in the place of the oldest: `[M, K, P], [M]`; padding is left out."""
        size = len(self.label)
        real = label != PADDING
        number, count = real.cumsum(0), real.sum()
        kept = real & (number > count - size)
        # One place more than there is takes what is not kept: to select would wait for the device.
        place = torch.where(kept, (self.seen + number - 1) % size, size)
        longer = F.pad(self.vectors, (0, 0, 0, 1))
        there = vectors.transpose(0, 1).to(longer.dtype)
        self.vectors.copy_(longer.index_copy(1, place, there)[:, :size])
        self.label.copy_(F.pad(self.label, (0, 1)).index_copy(0, place, label)[:size])
        self.seen += count
