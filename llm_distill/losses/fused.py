"""The head pass: all row-wise terms on logits in one chunked pass, gradients in the forward.

Logits of either model exist for one chunk of rows at a time. Each chunk is differentiated as soon
as its values are known, so the gradients of the hidden states and of the head are all that is kept;
therefore the weight of each term must be known before the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RowFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(student logits [n, V], teacher logits [n, V'] or None, labels [n]) -> values [n]."""

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk: 64 MiB in fp32."""


@dataclass(frozen=True)
class Work:
    """What a head pass does besides its differentiable inputs.

    Attributes:
        functions: The row-wise terms.
        labels: `[N]`.
        teacher: Rows -> teacher logits `[n, V']`; None where no term needs them.
        finish: From the product with the head's weight to logits.
        chunk: Rows at a time.
    """

    functions: Sequence[RowFunction]
    labels: Tensor
    teacher: Callable[[slice], Tensor] | None
    finish: Callable[[Tensor], Tensor]
    chunk: int


def head_pass(
    features: Tensor, weight: Tensor, bias: Tensor | None, shares: Tensor, work: Work
) -> tuple[Tensor, Tensor]:
    """Weighted sum of row-wise terms, differentiable, and the plain sum of each, detached.

    Args:
        features: `[N, D]`, the student's hidden states of the supervised rows, as its head takes
            them.
        weight: `[V, D]`, the student's head.
        bias: `[V]` or None.
        shares: `[K]`, factor of each term's sum.
        work: Terms, labels, teacher.

    Returns:
        `sum_k shares_k sum_n value_kn` as a scalar with gradients to features, weight and bias, and
        `[K]` sums. Both are fp32 (float64 for float64 features), whatever the autocast state; zero
        rows give zeros with a graph.
    """
    dtype = features.dtype
    if not torch.is_grad_enabled():  # needs_input_grad would still be true, and the work be done
        features, weight = features.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    if torch.is_autocast_enabled(features.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(features.device.type)
    with torch.autocast(features.device.type, enabled=False):
        return _untraced(features, weight, bias, shares, work, dtype)


def rows_per_chunk(vocabulary: int) -> int:
    """Rows whose logits take `CHUNK_ELEMENTS`, at least 16."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


class _HeadPass(torch.autograd.Function):
    """Values and gradients chunk by chunk; the backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch gives its context no public type
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shares: Tensor,
        work: Work,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Run all chunks."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = shares.to(wide).abs().max().clamp_min(1e-30)
        # O(1): fp16 gradients of logits would underflow at 1 / N.
        relative = shares.to(wide) / scale
        needs = ctx.needs_input_grad[:3]
        grads = _Gradients(features, weight, bias, needs, wide)
        narrow = weight.detach().to(dtype)
        offset = None if bias is None else bias.detach().to(dtype)
        sums = torch.zeros(len(work.functions), dtype=wide, device=features.device)
        for start in range(0, len(features), work.chunk):
            part = slice(start, start + work.chunk)
            h = features[part].detach().to(dtype)
            projected = h @ narrow.T if offset is None else torch.addmm(offset, h, narrow.T)
            values, slope = _differentiate(projected, part, relative, work, wanted=any(needs))
            sums += values
            if slope is not None:
                grads.add(part, slope.to(dtype), h, narrow)
        ctx.grads = grads.finished()
        ctx.scale = scale
        ctx.mark_non_differentiable(sums)
        return (shares.to(wide) * sums).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Multiply what the forward computed."""
        if ctx.grads is None:
            raise RuntimeError(
                "the head pass has one backward: its gradients were made in the forward and are "
                "used up; run the forward again instead of retain_graph=True"
            )
        factor = grad * ctx.scale
        # In fp32: a factor of 1 / N in the gradients' fp16 or bf16 would be rounded or 0.
        grads = [None if g is None else g.to(factor.dtype).mul_(factor).to(d) for g, d in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None)


# It differentiates inside its forward, which dynamo cannot trace: the graph breaks here.
_untraced: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.disable(_HeadPass.apply)


def _differentiate(
    projected: Tensor, part: slice, relative: Tensor, work: Work, *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of one chunk's values `[K]`, and the gradient of their weighted sum `[n, V]`."""
    teacher = None if work.teacher is None else work.teacher(part)
    with torch.set_grad_enabled(wanted):
        leaf = projected.requires_grad_(wanted)
        logits = work.finish(leaf)
        values = torch.stack([f(logits, teacher, work.labels[part]).sum() for f in work.functions])
        values = values.to(relative.dtype)
        total = (relative * values).sum()
        # A function of the labels or the teacher alone has no slope.
        slope = torch.autograd.grad(total, leaf)[0] if total.requires_grad else None
    return values.detach(), slope


class _Gradients:
    """Accumulators of the gradients somebody wants, in fp32 for the head."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Sequence[bool],
        wide: torch.dtype,
    ) -> None:
        self.dtypes = features.dtype, weight.dtype, None if bias is None else bias.dtype
        self.features = torch.zeros_like(features) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None

    def add(self, part: slice, slope: Tensor, h: Tensor, weight: Tensor) -> None:
        """One chunk: slope `[n, V]`, h `[n, D]`, weight `[V, D]`."""
        if self.features is not None:
            self.features[part] = (slope @ weight).to(self.features.dtype)
        if self.weight is not None:
            if slope.dtype == self.weight.dtype:
                self.weight.addmm_(slope.T, h)
            else:
                self.weight += slope.T @ h
        if self.bias is not None:
            self.bias += slope.to(self.bias.dtype).sum(0)

    def finished(self) -> list[tuple[Tensor | None, torch.dtype | None]]:
        """Each gradient with the dtype autograd expects."""
        return list(zip((self.features, self.weight, self.bias), self.dtypes, strict=True))
