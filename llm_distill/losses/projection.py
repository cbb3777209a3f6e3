"""Logits as hidden states and a head, made for a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_distill.losses.softmax import FLOOR, wide


@dataclass(frozen=True)
class Finish:
    """What follows the product with a head's weight: `softcap tanh(scale z / softcap)`.

    Attributes:
        scale: Factor on the logits (Cohere, Granite).
        softcap: Their bound (Gemma 2); None: none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, projected: Tensor) -> Tensor:
        """Logits in fp32 or better: `[n, V] -> [n, V]`."""
        z = wide(projected)
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def into(self, projected: Tensor, out: Tensor, *, clamp: bool) -> Tensor:
        """The same, written to `out`, which may be the input itself.

        Args:
            projected: The product.
            out: Of any floating dtype.
            clamp: Whether -inf is among them and has to be made finite.
        """
        if out is not projected:
            out.copy_(projected)
        if self.softcap is not None:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out.clamp_min_(FLOOR) if clamp else out

    def chain_(self, slope: Tensor, logits: Tensor) -> Tensor:
        """From the gradient of the logits to that of the product, in place: `[n, V] x2`.

        Args:
            slope: Is overwritten.
            logits: Finished; overwritten too where there is a soft cap.
        """
        if self.softcap is not None:
            slope.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        return slope if self.scale == 1.0 else slope.mul_(self.scale)


@dataclass(frozen=True)
class Projection:
    """Logits of N rows, as the features a head takes and the head.

    Attributes:
        features: `[N, D]`.
        weight: `[V, D]`.
        bias: `[V]` or None.
        finish: What follows the product.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None
    finish: Finish = field(default_factory=Finish)

    def __len__(self) -> int:
        """Rows."""
        return len(self.features)

    @property
    def finite(self) -> bool:
        """Whether no product can be -inf: there is no bias to say so, nor an overflow in fp16."""
        return self.bias is None and self.features.dtype != torch.float16

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight)

    def to(self, dtype: torch.dtype) -> Projection:
        """Detached, in the dtype of the matrix products."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        features, weight = self.features.detach().to(dtype), self.weight.detach().to(dtype)
        return Projection(features, weight, bias, self.finish)

    def product(self, rows: slice, out: Tensor) -> Tensor:
        """The product with the weight, bias added, for some rows: `[n, V]`, written to `out`."""
        features = self.features[rows]
        if self.bias is None:
            return torch.mm(features, self.weight.T, out=out)
        return torch.addmm(self.bias, features, self.weight.T, out=out)
