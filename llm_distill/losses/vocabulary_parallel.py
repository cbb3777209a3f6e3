"""Forward KL of a vocabulary that lies in slices on several processes, for heads that fit nowhere.

Each process has the logits of its own tokens for all rows. Neither model's logits are gathered:
four numbers a row cross the wire. The gradient is the closed form q - p. Summing through autograd,
with an identity behind every all-reduce, would give the right value and a wrong gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_distill.losses.softmax import wide

__all__ = ["gathered_rows", "vocabulary_parallel_kl"]


def vocabulary_parallel_kl(
    student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """KL(teacher || student) of whole rows, from slices: `[N, V / n], [N, V / n] -> [N]`, nats.

    A collective, forward only: its backward touches own slices alone. Every process gets the same
    values. The gradient of the student's slice is whole; that of what all processes share (hidden
    states, through `gathered_rows`) is summed there.

    Args:
        student: Logits of this process's tokens.
        teacher: Logits of the same tokens; no gradient.
        group: The processes that have the other tokens; None: all.

    Source: the closed form of `forward_kl` (Hinton et al. 2015, arXiv 1503.02531); slices as in
    Shoeybi et al. 2019 (Megatron-LM), arXiv 1909.08053, section 3.
    """
    values: Tensor = _ForwardKL.apply(student, teacher, group)
    return values


def gathered_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, one after the other: `[N, D] -> [n N, D]`.

    Each has as many; fill up with rows of weight 0. The backward sums what every process says of
    them and hands each its own.

    Args:
        rows: Hidden states of this process.
        group: The processes; None: all.
    """
    every: Tensor = _Gathered.apply(rows, group)
    return every


class _ForwardKL(torch.autograd.Function):
    """The closed form."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's
        student: Tensor,
        teacher: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Values; p and q are kept, of own tokens."""
        log_q, log_p = _log_softmax(wide(student), group), _log_softmax(wide(teacher), group)
        p = log_p.exp()
        ctx.save_for_backward(p, log_q.exp())
        ctx.dtype = student.dtype
        # A token that the teacher never says counts nothing, whatever the student thinks of it.
        return _summed(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1), group)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """Slope x (q - p)."""
        p, q = ctx.saved_tensors
        return (slopes[0].unsqueeze(-1) * (q - p)).to(ctx.dtype), None, None


class _Gathered(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # noqa: ANN401
        """All rows."""
        ctx.group, ctx.own = group, len(rows)
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, rows.contiguous(), group=group)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  autograd's
        """The sum of everyone's slopes, of own rows."""
        first = dist.get_rank(ctx.group) * ctx.own
        return _summed(slopes[0].clone(), ctx.group)[first : first + ctx.own], None


def _log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of whole rows, at own tokens."""
    peak = logits.amax(-1, keepdim=True)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shifted = logits - peak
    return shifted - _summed(shifted.exp().sum(-1, keepdim=True), group).log()


def _summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """In place, over the processes."""
    values = values.contiguous()
    dist.all_reduce(values, group=group)
    return values
