"""Hidden states and heads of both models, and the loss that is asked for."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_distill import losses
from llm_distill.losses import divergences, reweighted

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.bench.settings import HeadSettings

LOSSES: dict[str, Callable[..., Tensor]] = {
    name: vars(losses)[name]
    for module in (divergences, reweighted)
    for name in module.__all__
    if name in losses.__all__
}
"""The public divergences."""

CE_WEIGHT = 0.5
"""Of the cross-entropy in the arms that mix it in."""


@dataclass(frozen=True)
class Inputs:
    """N rows of both models, ready for their heads.

    Attributes:
        student: `[N, Hs]`.
        student_weight: `[V, Hs]`.
        teacher: `[N, Ht]`.
        teacher_weight: `[V, Ht]`.
        labels: `[N]`.
    """

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.student)

    @property
    def frozen(self) -> Inputs:
        """The same with a student's head that is not trained, as under LoRA."""
        return replace(self, student_weight=self.student_weight.detach())

    @classmethod
    def draw(cls, settings: HeadSettings) -> Inputs:
        """Random ones: logits with a standard deviation of 2, so that the softmax has a shape."""
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        options: dict[str, Any] = {"generator": generator, "device": settings.device}
        dtype: torch.dtype = vars(torch)[settings.dtype]

        def pair(width: int) -> tuple[Tensor, Tensor]:
            hidden = torch.randn(settings.rows, width, **options)
            weight = torch.randn(settings.vocab, width, **options) * (2 / width**0.5)
            return hidden.to(dtype), weight.to(dtype)

        student, student_weight = pair(settings.student_width)
        labels = torch.randint(settings.vocab, (settings.rows,), **options)
        return cls(
            student.requires_grad_(),
            student_weight.requires_grad_(),
            *pair(settings.teacher_width),
            labels,
        )


@dataclass(frozen=True)
class Loss:
    """A public divergence of `llm_distill.losses`.

    Attributes:
        name: Of the function.
        arguments: Its keyword arguments.
    """

    name: str
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Loss:
        """`forward_kl`, `jsd:beta=0.5`, `alpha_beta:alpha=0.3,beta=0.7`.

        Raises:
            ValueError: For a name that is no loss, or arguments that cannot be read.

        >>> Loss.parse("jsd:beta=0.25")
        Loss(name='jsd', arguments={'beta': 0.25})
        """
        name, _, rest = text.partition(":")
        if name not in LOSSES:
            raise ValueError(f"there is no divergence {name!r}; there are {', '.join(LOSSES)}")
        arguments = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            try:
                arguments[key] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                equals = ""
            if not equals:
                raise ValueError(f"{pair!r} of {text!r} is no argument; write jsd:beta=0.5")
        return cls(name, arguments)

    @property
    def function(self) -> Callable[..., Tensor]:
        """(student logits, teacher logits) -> values; the plain one where it has no arguments."""
        function = LOSSES[self.name]
        return partial(function, **self.arguments) if self.arguments else function

    @property
    def beta(self) -> float | None:
        """Place in GKD's family: 0 the forward KL, 1 the reverse, else JSD; None: not in it."""
        ends = {"forward_kl": 0.0, "reverse_kl": 1.0}
        if self.name == "jsd" and not self.arguments.keys() - {"beta"}:
            return float(self.arguments.get("beta", 0.5))
        return None if self.arguments else ends.get(self.name)
