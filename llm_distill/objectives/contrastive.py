"""Contrast: a student's state should tell its own item's teacher state from those of others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_distill.layers import LayerStrategy, asks, last, stays
from llm_distill.losses.softmax import wide
from llm_distill.objectives.base import Evidence, Term
from llm_distill.objectives.checks import check_choice, check_least
from llm_distill.objectives.embeddings import Fixed, Trained
from llm_distill.objectives.mapped import Mapped
from llm_distill.objectives.negatives import Crowd, Facts, Queue, Ranks, likes
from llm_distill.picks import Pick, Picked, pairs_texts, pick
from llm_distill.rows import RowKind
from llm_distill.signals import ModelSpec, Request, Signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_distill.layers import LayerMap, Row
    from llm_distill.rows import Batch, Step

ContrastItems = Literal["pooled", "token"]

MOST = {"pooled": 256, "token": 1024}
"""Items that a rank contrasts at once, unless it is told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Contrastive(Mapped):
    """Symmetric InfoNCE between trained embeddings of hidden states, mean over pairs and items.

    The student's embedding of an item should be closer to the teacher's of the same item than to
    those of all others, and the other way round. Both embeddings are affine maps of the
    layer-normalised states, scaled to length 1. Other items are those of the micro-batch on all
    ranks, so the loss changes with its size, and not with the number of ranks it is spread over.
    Items with the same token (of sequences: the same text) are no negatives of each other.

    Without a queue a micro-batch of one item is skipped; on several ranks, where nobody knows the
    others' number beforehand, an item alone counts, and is 0.

    It departs from the paper, whose critic draws its negatives from a memory of the whole data set:
    a stream of text has no indices to remember.

    Attributes:
        embedding: Features of the embeddings.
        temperature: What cosines are divided by.
        rows: `supervised` predictions, or every `valid` token.
        items: `pooled`: the mean of each sequence's rows is an item; `token`: each row is one.
        skip: Tokens at the start of each sequence that are left out (attention sinks).
        most: Items of a rank that are contrasted at once, drawn anew in each epoch; by default 256
            sequences or 1024 tokens.
        apart: Tokens of the same sequence this near are no negatives of each other either.
        queue: Teacher's embeddings of earlier items that the student's are told apart from as well,
            first in first out. With a queue the teacher's embedding is not trained but a fixed
            random orthonormal map: the queue's would be those of another map after each step.

    Raises:
        ValueError: For settings that cannot work.

    Source: Tian et al. 2019 (CRD), arXiv 1910.10699; van den Oord et al. 2018 (InfoNCE), arXiv
    1807.03748, equation 4; He et al. 2019 (MoCo), arXiv 1911.05722, for the queue.
    """

    layers: LayerStrategy = last
    embedding: int = 128
    temperature: float = 0.07
    rows: RowKind = "supervised"
    items: ContrastItems = "pooled"
    skip: int = 0
    most: int | None = None
    apart: int = 0
    queue: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_choice("Contrastive: rows", self.rows, ("supervised", "valid"))
        check_choice("Contrastive: items", self.items, get_args(ContrastItems))
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"Contrastive: temperature is {self.temperature}; write a number above 0 (0.07)"
            )
        check_least("Contrastive: embedding", self.embedding, 1)
        check_least("Contrastive: most", self.choice.most, 2)
        for name, number in (("skip", self.skip), ("apart", self.apart), ("queue", self.queue)):
            check_least(f"Contrastive: {name}", number, 0)
        if self.apart and self.items != "token":
            raise ValueError(
                f"Contrastive: apart is {self.apart} tokens, and items are {self.items}, one for a "
                "sequence; write items: token, or leave apart out"
            )
        if self.queue and not stays(self.layers):
            raise ValueError(
                "Contrastive: a queue outlives the layer map, which changes in the training; write "
                "queue: 0, or layers that stay"
            )

    @property
    def choice(self) -> Pick:
        """The rows and groups it asks for."""
        most = MOST[self.items] if self.most is None else self.most
        return Pick(self.rows, self.items, self.skip, most, least=2)

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to layers and widths.

        Raises:
            ValueError: For a map that does not fit, or whose shares are to be trained.
        """
        del evidence
        mapping = self.mapping(student, teacher)
        if mapping.trained:
            raise ValueError(
                f"Contrastive: layers has shares that are trained ({mapping.origin}), and its "
                "embeddings are already; write a strategy that decides, such as last"
            )
        return ContrastiveTerm(self, mapping, student.width, teacher.width)

    def describe(self) -> str:
        """Embedding, temperature, rows and items."""
        parts = [f"InfoNCE, embedding {self.embedding}", f"temperature {self.temperature:g}"]
        parts += [f"{self.rows} rows", f"items {self.items}"]
        if self.skip:
            parts.append(f"without the first {self.skip} tokens")
        parts.append(f"at most {self.choice.most} at once")
        if self.apart:
            parts.append(f"{self.apart} tokens apart")
        if self.queue:
            parts.append(f"queue {self.queue}, teacher's embedding fixed")
        return ", ".join(parts)


class ContrastiveTerm(Term):
    """Two embeddings for each row of the map.

    Attributes:
        accuracy: Share of a step's items whose student found its own teacher among all, `[]`; None
            before the first step. At 1 after a few steps the negatives are too easy.

    Args:
        spec: What was asked for.
        mapping: Decided, or that of epoch 0 of one that is drawn anew.
        student_width: Features of its hidden states.
        teacher_width: Features of its hidden states.
    """

    observes = 2

    mapping: LayerMap
    gathers = True

    def __init__(
        self, spec: Contrastive, mapping: LayerMap, student_width: int, teacher_width: int
    ) -> None:
        redraw = spec.layers if "epoch" in asks(spec.layers) else None
        every = frozenset(range(1, mapping.teacher_depth + 1))
        super().__init__(
            Request(hidden=mapping.student_layers),
            Request(hidden=mapping.teacher_layers if redraw is None else every),
            rows=spec.rows,
            notes=str(mapping).splitlines(),
        )
        self.spec, self.mapping, self._redraw = spec, mapping, redraw
        width, pairs = spec.embedding, len(mapping.rows)
        theirs = Fixed if spec.queue else Trained
        self.ours = nn.ModuleList(Trained(student_width, width) for _ in range(pairs))
        self.theirs = nn.ModuleList(theirs(teacher_width, width) for _ in range(pairs))
        self.queue = Queue(pairs, spec.queue, width) if spec.queue else None
        self.accuracy: Tensor | None = None

    @property
    def aligned(self) -> bool:
        """Not where the means of whole texts are compared."""
        return not pairs_texts(self.spec.choice)

    def count(self, batch: Batch) -> int:
        """Tokens or sequences that are contrasted."""
        return self._picked(batch).items

    def skipped(self, batch: Batch) -> int:
        """Batches with a single item and nothing to tell it apart from."""
        return self._picked(batch).skipped

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """Mean over rows of the map of the sum over items."""
        keeps = self.training and not step.rehearsal
        picked, ranks, rows = self._picked(batch), Ranks.now(), self._mapping(batch).rows
        with torch.autocast(batch.supervised.index.device.type, enabled=False):
            embedded = [
                self._embedded(place, row, student, teacher, picked)
                for place, row in enumerate(rows)
            ]
            own = torch.stack(embedded, 1)
            facts = Facts.of(picked, batch, self.spec.items).on(ranks)
            known = facts.gather(ranks, self._most)
            crowd = self._crowd(own, facts, known, ranks)
            found = [crowd.found(pair) for pair in range(len(rows))]
            total = self._total(crowd, found, picked.share[0], [row.weight for row in rows])
        if keeps and self.queue is not None:
            self.queue.push(crowd.everyone[:, :, 1], known.label)
        if keeps and self.observed is not None:
            hits = torch.stack([right for _, right in found]).sum()
            self.observed += torch.stack([hits, torch.full_like(hits, len(own) * len(found))])
        return total

    def least_sequences(self) -> int:
        """Two, of all ranks, unless tokens or a queue are there to tell them from."""
        return 2 if self.spec.items == "pooled" and self.queue is None else 1

    def figures(self) -> dict[str, float]:
        """How often the student found its own teacher in the last step, if it had any item."""
        accuracy = math.nan if self.accuracy is None else float(self.accuracy)
        return {} if math.isnan(accuracy) else {"accuracy": accuracy}

    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        """Keep the accuracy of the step."""
        del value, progress
        if observed is not None:
            self.accuracy = observed[0] / observed[1]

    def _picked(self, batch: Batch) -> Picked:
        """The items of a batch; one alone where something else may be told apart from it."""
        company = self.queue is not None or Ranks.now().world > 1
        choice = self.spec.choice
        return pick(batch, replace(choice, least=1) if company else choice)

    def _mapping(self, batch: Batch) -> LayerMap:
        """The map of this epoch."""
        redraw: Callable[..., LayerMap] | None = self._redraw
        if redraw is None:
            return self.mapping
        depths = self.mapping.student_depth, self.mapping.teacher_depth
        return redraw(*depths, epoch=batch.draw.epoch)

    @property
    def _most(self) -> int:
        """Places of a rank."""
        return cast("int", self.spec.choice.most)

    def _embedded(
        self, place: int, row: Row, student: Signals, teacher: Signals, picked: Picked
    ) -> Tensor:
        """Embeddings of both models for one row of the map: `[n, 2, P]`."""
        ours = _normal(picked.gather(student.hidden(row.student, picked.rows)))
        picked = picked.for_teacher
        theirs = [
            share * _normal(picked.gather(teacher.hidden(layer, picked.rows).detach()))
            for layer, share in row.teacher
        ]
        mixed = torch.stack(theirs).sum(0)
        return torch.stack([self.ours[place](ours), self.theirs[place](mixed)], 1)

    def _crowd(self, own: Tensor, facts: Facts, known: Facts, ranks: Ranks) -> Crowd:
        """The items among everyone's, and who is no candidate of whom."""
        place = torch.arange(len(known.label), device=own.device) - ranks.own * self._most
        itself = place == torch.arange(len(own), device=own.device)[:, None]
        hidden = facts.blocked(known, self.spec.apart) & ~itself
        waiting = own.new_zeros(own.shape[1], 0, own.shape[3])
        if self.queue is not None:
            waiting = self.queue.vectors.to(own.dtype)
            hidden = torch.cat([hidden, likes(facts.label, self.queue.label)], 1)
        everyone = ranks.gather(own, self._most)
        return Crowd(own, everyone, hidden, waiting, ranks, self.spec.temperature)

    def _total(
        self,
        crowd: Crowd,
        found: list[tuple[Tensor, Tensor]],
        share: float,
        weights: list[float],
    ) -> Tensor:
        """Sum over this rank's items; its gradient is that of all ranks' sum."""
        losses = [share * crowd.losses(pair).sum() for pair in range(len(weights))]
        if crowd.ranks.world > 1:
            sums = torch.stack([sums for sums, _ in found], 1)
            shares = sums.new_full((len(sums), 1), share)
            told = crowd.ranks.gather(torch.cat([sums.flatten(1), shares], 1), self._most)
            losses = [
                loss + crowd.owed(pair, told[:, 2 * pair : 2 * pair + 2], told[:, -1])
                for pair, loss in enumerate(losses)
            ]
        weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
        return torch.stack(weighted).sum() / sum(weights)


def _normal(states: Tensor) -> Tensor:
    """Zero mean and unit variance over the features: `[N, D] -> [N, D]`, fp32 or better."""
    return F.layer_norm(wide(states), states.shape[-1:])
