"""What one micro-batch gave: a loss and sums, or, where it is only measured, slopes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Outcome(NamedTuple):
    """What one micro-batch gave.

    Attributes:
        loss: A scalar in fp32, with a graph.
        sums: `[K]` of the terms, followed by those of `MEASURES` where the step asks to measure;
            detached.
        faults: Of rows whose loss is no number (`llm_distill.faults.find`).
        logits: `[B, T, V]` where the step asks for them.
    """

    loss: Tensor
    sums: Tensor
    faults: Tensor
    logits: Tensor | None


class Slopes(NamedTuple):
    """What one micro-batch gave that is only measured, at a layer of the student.

    Attributes:
        values: Sum of each term, `[]`, with a graph of its own that has one backward.
        hidden: `[B, T, D]`, the hidden state whose gradients are wanted.
    """

    values: tuple[Tensor, ...]
    hidden: Tensor

    def squares(self, names: Sequence[str]) -> list[Tensor]:
        """Squared norm of the gradient of each sum, `[]`.

        It is taken outside of the forward, where sharded parameters come back for every backward.

        Args:
            names: Of the terms.

        Raises:
            InputError: If there is no gradient, of one term or of all.
        """
        found = []
        for name, value in zip(names, self.values, strict=True):
            slope = None
            if self.hidden.requires_grad:
                (slope,) = torch.autograd.grad(
                    value, self.hidden, retain_graph=True, allow_unused=True
                )
            if slope is None:
                raise InputError(
                    f"balance: {name} has no gradient at the layer of the student where it is "
                    "measured: it reads below it, or nothing below it is trained; write another "
                    "layer, or balance: normalised"
                )
            found.append(slope.float().square().sum())
        return found
