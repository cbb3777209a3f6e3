"""Objectives on the next-token distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.divergences import FLOOR, forward_kl
from llm_distill.objectives.base import (
    Evidence,
    HeadTerm,
    Objective,
    check_choice,
    check_row_function,
)

if TYPE_CHECKING:
    from llm_distill.signals import ModelSpec

Scaling = Literal["none", "T", "T2"]


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Cross-entropy on the labels, over the student's whole vocabulary. Nats per token."""

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> HeadTerm:
        """Bind; nothing depends on the models."""
        del student, teacher, evidence
        return HeadTerm(lambda s, t, labels: cross_entropy(s, labels), needs_teacher=False)


@dataclass(frozen=True, kw_only=True)
class Logits(Objective):
    """A divergence between the two next-token distributions. Nats per supervised token.

    Where the vocabularies are padded to different sizes, both are cut to the common tokens and
    renormalised.

    Attributes:
        loss: (student logits `[N, V]`, teacher logits `[N, V]`) -> `[N]`.
        temperature: Both models' logits are divided by it.
        scaling: What the value is multiplied with: none, the temperature (T), or its square (T2),
            which keeps the size of the gradient as the temperature grows.

    Raises:
        ValueError: For a temperature that is not a finite number > 0, an unknown scaling, or a loss
            that does not return one value per row.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T2).
    """

    loss: Callable[[Tensor, Tensor], Tensor] = forward_kl
    temperature: float = 1.0
    scaling: Scaling = "T2"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"Logits: temperature is {self.temperature}; it must be a finite number > 0"
            )
        check_choice("Logits: scaling", self.scaling, ("none", "T", "T2"))
        check_row_function(self.loss, (2, 3), "Logits")

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> HeadTerm:
        """Bind to the vocabulary the two models share."""
        del evidence
        common = min(student.vocabulary, teacher.vocabulary)
        factor = self.temperature ** {"none": 0, "T": 1, "T2": 2}[self.scaling]

        def values(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            del labels
            tempered = s[:, :common] / self.temperature, t[:, :common] / self.temperature
            return factor * self.loss(*tempered)

        return HeadTerm(values)

    def describe(self) -> str:
        """Loss and temperature."""
        heat = (
            ""
            if self.temperature == 1
            else f", temperature {self.temperature:g}, scaling {self.scaling}"
        )
        return f"{describe_function(self.loss)}{heat}"


def row_wise(function: Callable[[Tensor, Tensor], Tensor]) -> HeadTerm:
    """A term from a function of two logit blocks, for objectives of one's own.

    Args:
        function: (student logits `[n, V]`, teacher logits `[n, V]`) -> `[n]`.
    """
    return HeadTerm(lambda s, t, labels: function(s, t))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the labels: `[N, V], [N] -> [N]`, nats."""
    return F.cross_entropy(logits.clamp_min(FLOOR), labels, reduction="none")


def describe_function(function: Callable[..., object]) -> str:
    """A function with its settings, as a recipe would write it.

    >>> from functools import partial
    >>> describe_function(partial(forward_kl))
    'forward_kl'
    """
    inner = getattr(function, "func", function)
    keywords = getattr(function, "keywords", {})
    arguments = ", ".join(f"{key}={value}" for key, value in keywords.items())
    name = getattr(inner, "__name__", type(inner).__name__)
    return f"{name}({arguments})" if arguments else str(name)
