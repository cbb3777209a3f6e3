"""The floor: the four GEMMs that any exact method runs, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.bench.inputs import Inputs
    from scripts.bench.measure import Run


@dataclass(frozen=True)
class Buffers:
    """What the GEMMs write to.

    Attributes:
        student: Logits of one chunk.
        teacher: Logits of one chunk.
        hidden: Gradient of the hidden states.
        head: Gradient of the head; in fp32 where chunks add up to it.
    """

    student: Tensor
    teacher: Tensor
    hidden: Tensor
    head: Tensor

    @classmethod
    def make(cls, inputs: Inputs, chunk: int) -> Buffers:
        """Empty ones."""
        h, w = inputs.student.detach(), inputs.student_weight.detach()
        rows = min(chunk, len(inputs))
        dtype = h.dtype if rows == len(inputs) else torch.float32
        return cls(
            h.new_empty(rows, len(w)),
            h.new_empty(rows, len(w)),
            torch.empty_like(h),
            torch.empty_like(w, dtype=dtype),
        )


def gemms(inputs: Inputs, chunk: int, *, reused: bool) -> Callable[[], Run]:
    """Logits of student and teacher, gradients of hidden states and head, in chunks of rows.

    Args:
        inputs: Rows and heads.
        chunk: Rows of one GEMM.
        reused: Whether the outputs are allocated once, outside of the timed region; fresh memory
            costs page faults, which every method that allocates its buffers in a step pays too.
    """

    def make() -> Run:
        kept = Buffers.make(inputs, chunk) if reused else None
        return lambda: run(inputs, kept or Buffers.make(inputs, chunk), chunk)

    return make


@torch.no_grad()
def run(inputs: Inputs, buffers: Buffers, chunk: int) -> None:
    """All chunks."""
    for start in range(0, len(inputs), chunk):
        rows = slice(start, start + chunk)
        h = inputs.student[rows]
        z, t = buffers.student[: len(h)], buffers.teacher[: len(h)]
        torch.mm(h, inputs.student_weight.T, out=z)
        torch.mm(inputs.teacher[rows], inputs.teacher_weight.T, out=t)
        torch.mm(z, inputs.student_weight, out=buffers.hidden[rows])
        _add_outer(buffers.head, z, h, first=start == 0)


def _add_outer(total: Tensor, z: Tensor, h: Tensor, *, first: bool) -> None:
    """`total (+)= z^T h`, in the dtype of `total`."""
    if z.dtype == total.dtype:
        torch.addmm(total, z.T, h, beta=0 if first else 1, out=total)
    elif total.is_cuda:  # only CUDA multiplies half precision into fp32
        beta = 0 if first else 1
        torch.addmm(total, z.T, h, out_dtype=torch.float32, beta=beta, out=total)
    elif first:
        total.copy_(z.T @ h)
    else:
        total += z.T @ h
