"""A gate on a hint: it watches whether the hint pulls against everything else, and closes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK, SHARE = 10, 0.01
"""Steps of a block, at least, and its share of the training: neighbouring steps are alike, the
means of blocks much less, and there are no more than 100 of them to be misled by."""
MOMENTUM = 0.95
"""Of the running mean over blocks: about the last 20 count."""
WARMUP = 10
"""Blocks before which a gate does not close: their spread is not known yet."""
ERRORS = 5.0
"""Standard errors by which the mean must be negative. It is looked at after every block: of 2,000
trainings of 200 or 1,000 steps on zero-mean noise (normal, skewed, heavy-tailed) less than 0.5 %
closed, less than 2.5 % where the noise of neighbouring steps correlates with 0.8. With 0.95, up to
a fifth of short trainings did."""
CLOSING = 0.1
"""Share of the training over which the hint's weight falls to 0 once the gate closes."""
SUMS = 4
"""What is added up: the product of both gradients, their squared lengths, and that of the rest at
the highest layer alone."""


class Watch:
    """Splits the gradient at captured hidden states into the hint's own and the rest.

    The hint reads a state through `own`, everything else reads the state itself. In the backward
    the first hook sees the hint's gradient, the second the sum of all: no second backward, nothing
    read by the host. The rest at a layer holds what the hint wants of the layers above it; at the
    highest layer it is everything else alone.

    Args:
        observed: `[4]`, where the sums go.
        highest: The highest layer that the hint reads.
    """

    def __init__(self, observed: Tensor, highest: int) -> None:
        self._observed, self._highest = observed, highest

    def own(self, state: Tensor, layer: int) -> Tensor:
        """The same state, through which the hint reads it: `[B, T, D] -> [B, T, D]`."""
        if not state.requires_grad:
            return state
        branch = state.view_as(state)
        kept: list[Tensor] = []
        branch.register_hook(kept.append)
        state.register_hook(self._split(kept, float(layer == self._highest)))
        return branch

    def _split(self, kept: list[Tensor], highest: float) -> Callable[[Tensor], None]:
        """The hook that sees the sum of all gradients, after `kept` has the hint's."""

        def split(whole: Tensor) -> None:
            if not kept:
                return
            hint = kept.pop().float()
            rest = whole.float() - hint
            square = rest.square().sum()
            sums = [(hint * rest).sum(), hint.square().sum(), square, highest * square]
            self._observed.add_(torch.stack(sums))

        return split


class Gate(nn.Module):
    """Open at 1 until the hint's gradient is, on average, against the rest; then it falls to 0.

    Each step gives the cosine between both gradients over all captured layers. Once the running
    mean over blocks of steps is negative by more than `ERRORS` standard errors, the factor goes to
    0 linearly over a tenth of the training, and stays there. A step in which nothing but the hint
    is trained says nothing.

    Attributes:
        steps: Steps so far, `[]`.
        block: Steps of this block that said something, and the sum of their cosines, `[2]`.
        blocks: Whole blocks so far, `[]`.
        kept: Running sums over blocks: weights, squared weights, means, squared means, `[4]`.
        closed: Progress at which it began to close, `[]`; infinite while it is open.
        value: The factor now, `[]`.

    Source: Du et al. 2018, arXiv 1812.02224, section 2, which switches an auxiliary loss by the
    sign of this cosine in each step; here the mean decides, once.
    """

    steps: Tensor
    block: Tensor
    blocks: Tensor
    kept: Tensor
    closed: Tensor
    value: Tensor
    _decay: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0.0))
        self.register_buffer("block", torch.zeros(2))
        self.register_buffer("blocks", torch.tensor(0.0))
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("closed", torch.tensor(math.inf))
        self.register_buffer("value", torch.tensor(1.0))
        decay = torch.tensor([MOMENTUM, MOMENTUM**2, MOMENTUM, MOMENTUM])
        self.register_buffer("_decay", decay, persistent=False)

    @torch.no_grad()
    def after_step(self, observed: Tensor, progress: float) -> None:
        """Take one step's sums `[4]`, on the device; a step without a hint changes nothing."""
        product, hint, rest, alone = observed.to(self.value.dtype).unbind()
        lengths = hint.sqrt() * rest.sqrt()  # not of the product, which is too small for fp32
        cosine = product / lengths
        seen = cosine.isfinite() & lengths.isfinite() & (alone > 0.0)
        one = torch.ones_like(cosine)
        self.block.add_(torch.where(seen, torch.stack([one, cosine]), 0.0))
        self.steps.add_(1.0)
        whole = self.block[0] >= (SHARE / progress * self.steps).clamp_min(BLOCK)
        mean = self.block[1] / self.block[0]
        moved = self._decay * self.kept + torch.stack([one, one, mean, mean.square()])
        self.kept.copy_(torch.where(whole, moved, self.kept))
        self.blocks.add_(whole)
        self.block.copy_(torch.where(whole, 0.0, self.block))
        now = torch.full_like(self.closed, progress).minimum(self.closed)
        self.closed.copy_(torch.where(self._against, now, self.closed))
        # A resumed training may be longer, with less progress than when it closed.
        falling = 1.0 - (progress - self.closed) / CLOSING
        self.value.copy_(falling.clamp_min(0.0).minimum(self.value))

    @property
    def cosine(self) -> Tensor:
        """Its running mean, `[]`; NaN before the first block is whole."""
        return self.kept[2] / self.kept[0]

    def report(self) -> dict[str, float]:
        """For the log: the mean cosine, read from the device; nothing before the first block."""
        cosine = float(self.cosine)
        return {} if math.isnan(cosine) else {"cosine": cosine}

    @property
    def _against(self) -> Tensor:
        """Whether the mean is negative by enough, `[]`."""
        weight, squares, _, square = self.kept.unbind()
        number = weight.square() / squares  # of blocks, as if all weighed alike
        variance = (square / weight - self.cosine.square()).clamp_min(0.0)
        error = (variance / (number - 1.0)).sqrt()
        return (self.blocks >= WARMUP) & (self.cosine + ERRORS * error < 0.0)
