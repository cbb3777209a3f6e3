"""Row-wise terms on logits: what one pass over the head can compute.

Any function of a block of rows is one. Those of this module are plain functions too, but the pass
knows them: they share their softmax with each other, and have their gradient in closed form where
their loss has one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.described import describe_function
from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.softmax import FLOOR, wide

RowFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(student logits [n, V], teacher logits [n, V'] or None, labels [n]) -> values [n]."""


@dataclass(frozen=True)
class Nll:
    """Negative log-likelihood of the labels, over the student's whole vocabulary. Nats."""

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """One value per row: `[n, V], any, [n] -> [n]`."""
        del teacher
        return F.cross_entropy(wide(student).clamp_min(FLOOR), labels, reduction="none")


@dataclass(frozen=True)
class Alone:
    """A function of the student's logits alone, whatever teacher there is.

    Attributes:
        function: Student logits `[n, V]` -> `[n]`.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """One value per row: `[n, V], any, any -> [n]`."""
        del teacher, labels
        return self.function(student)


@dataclass(frozen=True, eq=False)
class Tempered:
    """A divergence on the first tokens of both vocabularies, at a temperature.

    Attributes:
        loss: (student logits `[n, V]`, teacher logits `[n, V]`) -> `[n]`; one that has an argument
            named `labels` is given them, `[n]`.
        width: Tokens that both vocabularies have, to which they are cut and renormalised; None:
            as many as the smaller one.
        temperature: Both models' logits are divided by it.
        factor: On the value.
        mix: A number on the device in [0, 1], the teacher's share of a moving target: its logits
            become `(1 - mix) * student + mix * teacher`, the student's without a gradient. None: 1.
    """

    loss: Callable[..., Tensor] = forward_kl
    width: int | None = None
    temperature: float = 1.0
    factor: float = 1.0
    mix: Tensor | None = None

    def __str__(self) -> str:
        """For messages.

        >>> print(Tempered(forward_kl, temperature=2.0))
        forward_kl at temperature 2
        """
        told = describe_function(self.loss)
        if self.temperature != 1.0:
            told += f" at temperature {self.temperature:g}"
        return told if self.mix is None else f"{told} with a target that moves"

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """One value per row: `[n, V], [n, V'], [n] -> [n]`."""
        if teacher is None:
            raise ValueError("a divergence needs the teacher's logits, and there are none")
        width = self.width or min(student.shape[1], teacher.shape[1])
        s, t = wide(student)[:, :width], wide(teacher)[:, :width]
        t = self.target(s.detach(), t)
        if self.temperature != 1.0:
            s, t = s / self.temperature, t / self.temperature
        if takes_labels(self.loss):
            return self.factor * self.loss(s, t, labels=labels)
        return self.factor * self.loss(s, t)

    def target(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits the student should reach: `[n, V] x2 -> [n, V]`; without a mix the teacher's."""
        if self.mix is None:
            return teacher
        start, end = student.clamp_min(FLOOR), teacher.clamp_min(FLOOR)
        return start.lerp_(end, self.mix.to(start.dtype))


RowTerm = Nll | Alone | Tempered | RowFunction


def takes_labels(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss asks for the labels, by an argument of that name."""
    try:
        return "labels" in inspect.signature(loss).parameters
    except ValueError:  # a builtin without a signature
        return False
