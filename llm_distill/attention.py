"""The attention of one block as it was captured, and the maps that are made of it.

Select, then compute: keys that no asked query sees and places that do not count are zero before
anything is multiplied, so whatever stands at padded positions (NaN too) touches neither a value nor
a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llm_distill.losses.softmax import wide

if TYPE_CHECKING:
    from llm_distill.queries import Block, Queries

Kind = Literal["query", "key", "value"]
"""What relations are made of."""

INVISIBLE = -1e4
"""Additive masks: below it a key is not seen at all; above it is a bias."""


@dataclass(frozen=True)
class Heads:
    """The attention of one block for the asked query positions, everything after rotary embedding.

    Attributes:
        query: `[B, H, R, d]`, the asked positions only.
        key: `[B, Hkv, T, d]`.
        mask: `[B or 1, 1 or H, R, T]`, boolean (True: visible) or additive, or None (all visible).
        scaling: Factor on the scores.
        softcap: Bound of the scores, before the mask.
        value: `[B, Hkv, T, d]`, where relations were asked for.
        whole_query: `[B, H, T, d]`, where relations were asked for.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    value: Tensor | None = None
    whole_query: Tensor | None = None

    def part(self, sequences: slice, places: int, length: int) -> Heads:
        """Some sequences, without the padding of others.

        Args:
            sequences: Of the batch.
            places: R that is left.
            length: T that is left.
        """

        def cut(vectors: Tensor | None, size: int) -> Tensor | None:
            return None if vectors is None else vectors[sequences, :, :size]

        mask = self.mask
        if mask is not None:
            mask = (mask if len(mask) == 1 else mask[sequences])[:, :, :places, :length]
        return replace(
            self,
            query=self.query[sequences, :, :places],
            key=self.key[sequences, :, :length],
            mask=mask,
            value=cut(self.value, length),
            whole_query=cut(self.whole_query, length),
        )

    def maps(self, queries: Queries) -> Tensor:
        """Attention probabilities of the asked rows, no dropout, fp32 or better: `[n, H, T]`.

        Args:
            queries: The positions this was captured for.
        """
        rows = self.query.shape[2]
        block = next(queries.blocks(max(1, len(self.query)) * rows), None)
        if block is None or not len(queries):
            # Zero rows with a graph, whatever the numbers are.
            return wide(self.query).new_zeros(0, self.query.shape[1], self.key.shape[2]) + (
                0 * self.query[:0].sum() + 0 * self.key[:0].sum()
            )
        return block.rows(self.prepared(queries).probabilities(block)[0])

    def prepared(self, queries: Queries) -> Scores:
        """Everything maps need, clean, scaled and in fp32 or better."""
        visible = self.visible
        idle = ~queries.used[:, None, :, None]
        unseen = None
        if visible is not None:
            unseen = ~(visible & ~idle).any(2).any(1)[:, None, :, None]
            idle = idle | ~visible.any(3, keepdim=True)
        biased = self.mask is not None and self.mask.dtype != torch.bool
        key = wide(self.key)
        return Scores(
            query=(wide(self.query) * self.scaling).masked_fill(idle, 0.0),
            key=key if unseen is None else key.masked_fill(unseen, 0.0),
            visible=visible,
            bias=self.mask if biased else None,
            softcap=self.softcap,
            idle=idle,
        )

    def relation(self, kind: Kind, heads: int, queries: Queries) -> Heads:
        """One kind of vector against itself, all heads side by side and split anew: A heads.

        The rows of `softmax(X X^T / sqrt(d_A))` are then its maps, under the same mask.

        Args:
            kind: Of the vectors.
            heads: A, the relation heads.
            queries: The positions this was captured for.

        Raises:
            LookupError: If this was captured without whole queries and values.
            ValueError: If the relation heads do not divide the width.
        """
        whole = {"query": self.whole_query, "key": self.key, "value": self.value}[kind]
        if whole is None:
            raise LookupError(
                f"whole {kind} vectors were not asked for; put the block into `relations` of the "
                "term's request"
            )
        joined = whole.transpose(1, 2).flatten(2)
        if joined.shape[2] % heads:
            raise ValueError(
                f"{heads} relation heads do not divide the {kind} width {joined.shape[2]} of this "
                "block"
            )
        split = joined.unflatten(2, (heads, -1)).transpose(1, 2)
        width = split.shape[3]
        place = queries.position[:, None, :, None].expand(-1, heads, -1, width)
        visible = self.visible
        mask = None if visible is None else visible.any(1, keepdim=True)
        return Heads(split.gather(2, place), split, mask, width**-0.5)

    @property
    def visible(self) -> Tensor | None:
        """Which keys a query sees: `[B or 1, 1 or H, R, T]`; None: all."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return self.mask
        return self.mask >= INVISIBLE


@dataclass(frozen=True)
class Scores:
    """Clean queries and keys whose product is the scores.

    Attributes:
        query: `[B, H, R, d]`, scaled, 0 at `idle` places.
        key: `[B, Hkv, T, d]`, 0 where no query that counts sees it.
        visible: `[B or 1, 1 or H, R, T]`, or None (all).
        bias: As `visible`, added to the scores, or None.
        softcap: Bound of the scores.
        idle: `[B, 1 or H, R, 1]`, places that do not count or see nothing.
    """

    query: Tensor
    key: Tensor
    visible: Tensor | None
    bias: Tensor | None
    softcap: float | None
    idle: Tensor

    def probabilities(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Of one block `[b, H, r, T]`; where scores are capped, their tanh as well.

        A query that sees nothing is uniform.
        """
        query, key = self.grouped(block)
        scores = (query @ key.transpose(-1, -2)).view(
            len(query), self.query.shape[1], -1, key.shape[2]
        )
        bent = None
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores = self.softcap * bent
        floor = self._floor(block, scores.dtype)
        if floor is not None:
            scores = scores.add_(floor)
        return scores.softmax(-1), bent

    def grouped(self, block: Block) -> tuple[Tensor, Tensor]:
        """Queries that share a key head side by side, and the keys: `[b, Hkv, *, d] x2`."""
        query = block.of(self.query).unflatten(1, (self.key.shape[1], -1)).flatten(2, 3)
        return query, self.key[block.sequences]

    def _floor(self, block: Block, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a block: biases, and the lowest number where hidden.

        One addition, as masks of booleans are slow; the lowest number plus a score is the lowest.
        """
        if self.visible is None:
            return None
        visible = block.of(self.visible)
        floor = torch.zeros((), dtype=dtype, device=visible.device)
        if self.bias is not None:
            floor = block.of(self.bias).to(dtype)
        return torch.where(visible, floor, torch.finfo(dtype).min)
