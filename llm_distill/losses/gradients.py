"""What a head pass keeps for its backward: the gradients somebody wants, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.losses.projection import Projection


STRIPE = 1 << 20
"""Numbers of a gradient that a CPU adds at a time."""


class Gradients:
    """Accumulators of the gradients somebody wants, in fp32 for the head."""

    def __init__(
        self, leaves: Sequence[Tensor | None], needs: Sequence[bool], wide: torch.dtype
    ) -> None:
        wanted = [leaf if need else None for leaf, need in zip(leaves, needs, strict=True)]
        features, weight, bias = wanted
        self._dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        self.features = None if features is None else torch.empty_like(features)
        self.weight = None if weight is None else torch.empty_like(weight, dtype=wide)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        if self.weight is not None and leaves[0] is not None and not len(leaves[0]):
            self.weight.zero_()

    def add(self, rows: slice, slope: Tensor, own: Projection) -> None:
        """One chunk: the gradient of its product `[n, V]`."""
        if self.features is not None:
            if self.features.dtype == slope.dtype:
                torch.mm(slope, own.weight, out=self.features[rows])
            else:
                self.features[rows] = slope @ own.weight
        if self.weight is not None:
            # A row at fault has a slope of 0, but 0 times NaN is NaN for the whole head.
            features = own.features[rows].nan_to_num(0.0, 0.0, 0.0)
            accumulate(self.weight, slope.T, features, fresh=rows.start == 0)
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.bias.dtype)

    def finished(self) -> list[tuple[Tensor | None, torch.dtype | None]]:
        """Each gradient with the dtype autograd expects."""
        return list(zip((self.features, self.weight, self.bias), self._dtypes, strict=True))


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """`total += a @ b`, in the dtype of the total as far as the device can: `[V, n], [n, D]`.

    Args:
        total: fp32, or the dtype of the factors.
        a: Factor.
        b: Factor.
        fresh: Whether the total holds nothing yet and is set.
    """
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if fresh else total.addmm_(a, b)
    elif a.is_cuda:  # halves in, fp32 out, in one product
        dtype = total.dtype
        if fresh:
            torch.mm(a, b, out_dtype=dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=dtype, out=total)
    else:  # in stripes: what a product gives in halves stays in the cache until it is added
        rows = max(1, STRIPE // max(1, b.shape[1]))
        for part, factor in zip(total.split(rows), a.split(rows), strict=True):
            if fresh:
                part.copy_(factor @ b)
            else:
                part.add_(factor @ b)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times a factor, multiplied in the wider dtype of the two."""
    if gradient.dtype == factor.dtype == dtype:
        return gradient.mul_(factor)
    return gradient.to(factor.dtype).mul_(factor).to(dtype)
