"""Maps from hidden states to vectors of length 1 that are compared by their cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_distill.losses.features import unit


class Trained(nn.Linear):
    """An affine map, `[N, D] -> [N, P]`, computed in the states' dtype whatever its own is.

    Source: Tian et al. 2019 (CRD), arXiv 1910.10699, their code.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of length 1."""
        dtype = input.dtype
        return unit(F.linear(input, self.weight.to(dtype), self.bias.to(dtype)))


class Fixed(nn.Module):
    """A random orthonormal map that stays as it is drawn, `[N, D] -> [N, P]`.

    Cosines stay where it widens, and nearly where it narrows to many features.

    Attributes:
        weight: `[P, D]`, no parameter.
    """

    def __init__(self, width: int, embedding: int) -> None:
        self.weight: Tensor
        super().__init__()
        self.register_buffer("weight", nn.init.orthogonal_(torch.empty(embedding, width)))

    def forward(self, states: Tensor) -> Tensor:
        """Of length 1."""
        return unit(F.linear(states, self.weight.to(states.dtype)))
