"""The pass over maps: values of query rows and their gradients, block by block, in the forward.

A block of query rows is small enough for the cache (or large enough to fill a GPU); its maps and
their gradient exist only while it is worked on, and no map is made twice. What is kept are the
gradients of the student's queries and keys. A loss is differentiated by autograd as far as the
maps; the softmax and the two products behind them are in closed form:
`dS = P * (dP - (P dP 1) 1^T)`, `dQ = dS K`, `dK = dS^T Q`. `map_kl` of the student's heads one by
one needs no autograd: `dS = Q - P`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_distill.losses.attention import map_kl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_distill.attention import Heads, Scores
    from llm_distill.queries import Block, Queries

    PairLoss = Callable[[Tensor, Tensor], Tensor]
    Sides = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]
    """(student's maps `[n, Hs, T]`, maps of each teacher block `[n, Ht, T]`) -> both sides of the
    loss, with one head count."""

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Scores of a block, both models together."""

LEAST_ROWS = 16
"""Of a block: with fewer, the matrix products are slow."""


def map_pass(
    student: Heads,
    teachers: Sequence[Heads],
    queries: Queries,
    loss: PairLoss,
    sides: Sides,
) -> Tensor:
    """Weighted sum over the query rows, differentiable, fp32 or better: a scalar.

    Args:
        student: Of one block; gradients go to its queries and keys.
        teachers: Blocks that its maps are compared with, without a gradient.
        queries: The positions all were captured for; each row counts with its weight.
        loss: One value per row.
        sides: What the loss is given.
    """
    leaves = student.query, student.key
    if not torch.is_grad_enabled():  # needs_input_grad would still be true, and the work be done
        leaves = student.query.detach(), student.key.detach()
    total: Tensor = _untraced(*leaves, _Work(student, teachers, queries, loss, sides))
    return total


class _Work:
    """What a pass does besides its differentiable inputs."""

    def __init__(
        self,
        student: Heads,
        teachers: Sequence[Heads],
        queries: Queries,
        loss: PairLoss,
        sides: Sides,
    ) -> None:
        self.student, self.queries, self.loss, self.sides = student, queries, loss, sides
        self.own = student.prepared(queries)
        self.others = [teacher.prepared(queries) for teacher in teachers]

    @property
    def places(self) -> int:
        """Of one block."""
        scores = sum(side.query.shape[1] * side.key.shape[2] for side in (self.own, *self.others))
        kind = self.own.query.device.type
        return max(LEAST_ROWS, BLOCK.get(kind, BLOCK["cuda"]) // max(1, scores))

    def run(self, slopes: Slopes | None) -> Tensor:
        """The weighted sum over all blocks; with `slopes`, its gradient is added there."""
        total = self.own.query.new_zeros(())
        for block in self.queries.blocks(self.places):
            targets = [block.rows(side.probabilities(block)[0]) for side in self.others]
            maps, bent = self.own.probabilities(block)
            value, slope = self._scored(block, maps, targets, wanted=slopes is not None)
            total = total + value
            if slopes is not None and slope is not None:
                slopes.add(block, slope, bent)
        return total

    def _scored(
        self, block: Block, maps: Tensor, targets: Sequence[Tensor], *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of one block, and its gradient by the scores `[b, H, r, T]`."""
        rows = block.rows(maps)
        own, target = self.sides(rows, targets)
        if own is rows and self.loss is map_kl:
            value = (map_kl(own, target) * block.weight).sum()
            if not wanted:
                return value, None
            slope = (own - target).mul_((block.weight / own.shape[1])[:, None, None])
            return value, block.back(slope, len(maps))
        leaf = maps.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            values = self.loss(*self.sides(block.rows(leaf), targets))
            total = (values * block.weight).sum()
        if not total.requires_grad:
            return total, None
        (slope,) = torch.autograd.grad(total, leaf)
        slope = slope * maps
        return total.detach(), slope.addcmul_(maps, slope.sum(-1, keepdim=True), value=-1)


class Slopes:
    """Gradients of the clean queries and keys of one block, as `Scores` has them."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.query = torch.zeros_like(scores.query)
        # Transposed: the product that is added up is several times faster for narrow heads.
        self.key = torch.zeros_like(
            scores.key.transpose(-1, -2), memory_format=torch.contiguous_format
        )

    def add(self, block: Block, slope: Tensor, bent: Tensor | None) -> None:
        """One block.

        Args:
            block: Which.
            slope: Gradient of its scores `[b, H, r, T]`.
            bent: Tanh of capped scores.
        """
        if bent is not None:
            slope = slope * (1 - bent.square())
        query, key = self.scores.grouped(block)
        slope = slope.reshape(len(key), key.shape[1], -1, key.shape[2])
        rows = (key.transpose(-1, -2) @ slope.transpose(-1, -2)).transpose(-1, -2)
        self.query[block.sequences, :, block.columns] = rows.unflatten(
            2, (-1, _size(block))
        ).flatten(1, 2)
        # A place that does not count has a query of 0, so it leaves no trace here.
        total = self.key[block.sequences].flatten(0, 1)
        total.baddbmm_(query.flatten(0, 1).transpose(-1, -2), slope.flatten(0, 1))

    def finished(self, student: Heads) -> tuple[Tensor, Tensor]:
        """Of the captured queries and keys, in their dtypes."""
        query = self.query.mul_(student.scaling).masked_fill_(self.scores.idle, 0.0)
        key = self.key.transpose(-1, -2)
        return query.to(student.query.dtype), key.to(student.key.dtype)


def _size(block: Block) -> int:
    """Columns of a block."""
    return int(block.columns.stop - block.columns.start)


class _MapPass(torch.autograd.Function):
    """Values and gradients block by block; the backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch gives its context no public type
        query: Tensor,
        key: Tensor,
        work: _Work,
    ) -> Tensor:
        """Run all blocks."""
        del query, key  # The work has them: they are here for their gradients.
        slopes = Slopes(work.own) if any(ctx.needs_input_grad[:2]) else None
        total = work.run(slopes)
        if slopes is not None:
            ctx.save_for_backward(*slopes.finished(work.student))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  as above
        """Multiply what the forward computed."""
        query, key = ctx.saved_tensors
        return (query * grad).to(query.dtype), (key * grad).to(key.dtype), None


# It differentiates inside its forward, which dynamo cannot trace: the graph breaks here.
_untraced: Callable[..., Tensor] = torch.compiler.disable(_MapPass.apply)
