"""Targets that move from the student to the teacher while the student learns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_distill.objectives.base import HeadTerm

if TYPE_CHECKING:
    from llm_distill.losses.rowwise import Tempered

TINY = 1e-20
"""Stands in for a loss of 0, nats."""


@dataclass(frozen=True, kw_only=True)
class Taid:
    """A target between student and teacher, which goes on as fast as the student follows.

    The target's logits are `(1 - t) * student + t * teacher`, without a gradient through them. t
    starts at `start` and never falls behind the straight line to `end`; while the loss falls it
    runs ahead: after each step, with l the mean of the term's value over the step,

        m <- momentum m + (1 - momentum) (l_before - l) / l_before,
        t <- min(end, max(line, t + pace sigmoid(m) (1 - t))).

    An evaluation measures against `end`, so that its loss does not rise as the target moves.

    Departures: the mean is over the whole step, all its micro-batches and ranks; a relative fall
    counts within [-1, 1], since a step from a loss of 0 (`start=0`) would else stop t for good; the
    line holds from the first step on.

    Attributes:
        start: Share of the teacher at the beginning, a fraction: 0.2 to 0.4 in the paper's code.
        end: Share at the end, a fraction, not less than the start.
        pace: How far a step may run ahead; 0 follows the line.
        momentum: Of the loss's relative fall, a fraction below 1.

    Raises:
        ValueError: For numbers outside these ranges.

    Source: Shing et al. 2025 (TAID), arXiv 2501.16937; the update as its authors' code has it.
    """

    start: float = 0.4
    end: float = 1.0
    pace: float = 5e-4
    momentum: float = 0.99

    def __post_init__(self) -> None:
        """Refuse impossible numbers at once."""
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"Taid: start={self.start}, end={self.end}; write 0 <= start <= end <= 1, shares "
                "of the teacher in the target"
            )
        if not (math.isfinite(self.pace) and self.pace >= 0.0):
            raise ValueError(f"Taid: pace={self.pace}; write a finite number >= 0 (5e-4)")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"Taid: momentum={self.momentum}; write 0 <= momentum < 1 (0.99)")

    def describe(self) -> str:
        """For tables.

        >>> Taid(start=0.2).describe()
        'target Taid from 0.2 to 1'
        """
        return f"target Taid from {self.start:g} to {self.end:g}"


class MovingTerm(HeadTerm):
    """A divergence to a moving target.

    Attributes:
        mix: The teacher's share now, `[]`.
        momentum: Mean relative fall of the loss, `[]`.
        before: Mean value of the last step, `[]`; NaN before the first.
    """

    adapts = True

    def __init__(self, row: Tempered, target: Taid) -> None:
        self.mix: Tensor
        self.momentum: Tensor
        self.before: Tensor
        self._end: Tensor
        super().__init__(row)
        self._plain, self.target = row, target
        self.register_buffer("mix", torch.tensor(target.start))
        self.register_buffer("momentum", torch.tensor(0.0))
        self.register_buffer("before", torch.tensor(math.nan))
        self.register_buffer("_end", torch.tensor(target.end), persistent=False)

    @property
    def row(self) -> Tempered:
        """The divergence to the target of this step; in an evaluation to the last one."""
        if self.training:
            return replace(self._plain, mix=self.mix)
        return self._plain if self.target.end == 1.0 else replace(self._plain, mix=self._end)

    def figures(self) -> dict[str, float]:
        """The teacher's share in the target."""
        return {"target": float(self.mix)}

    @torch.no_grad()
    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        """Move the target, on the device."""
        del observed
        target, value = self.target, value.to(self.mix.dtype)
        fall = ((self.before - value) / (self.before + TINY)).clamp(-1.0, 1.0)
        known = fall.isfinite()  # neither the first step, nor one without items
        mean = target.momentum * self.momentum + (1.0 - target.momentum) * fall
        self.momentum.copy_(torch.where(known, mean, self.momentum))
        self.before.copy_(torch.where(value.isfinite(), value, self.before))
        line = target.start + (target.end - target.start) * progress
        ahead = self.mix + target.pace * torch.sigmoid(self.momentum) * (1.0 - self.mix)
        ahead = torch.where(known, ahead, self.mix)
        self.mix.copy_(ahead.clamp(min(line, target.end), target.end))
