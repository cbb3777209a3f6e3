"""Objectives on the next-token distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llm_distill.losses.described import describe_function
from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.rowwise import Nll, Tempered, takes_labels
from llm_distill.objectives.base import Evidence, HeadTerm, Objective
from llm_distill.objectives.checks import check_choice, check_row_function
from llm_distill.objectives.moving import MovingTerm, Taid
from llm_distill.signals import Request

if TYPE_CHECKING:
    from llm_distill.signals import ModelSpec

Scaling = Literal["none", "T", "T2"]


COLDEST = 1e-6
"""Divided by less, the number that stands for -inf would be -inf."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Cross-entropy on the labels, over the student's whole vocabulary. Nats per token.

    Attributes:
        exit: Of a layer below the last, 1 the first block, as in `Logits`.
    """

    exit: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        _check_exit("CrossEntropy", self.exit)

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> HeadTerm:
        """Bind; nothing depends on the models."""
        del teacher, evidence
        return at_exit(HeadTerm(Nll(), needs_teacher=False), self.exit, student)

    def describe(self) -> str:
        """Of which layer, where it is not the last."""
        return "" if self.exit is None else f"exit {self.exit}"


@dataclass(frozen=True, kw_only=True)
class Logits(Objective):
    """A divergence between the two next-token distributions. Nats per supervised token.

    Where the vocabularies are padded to different sizes, both are cut to the common tokens and
    renormalised.

    Attributes:
        loss: (student logits `[N, V]`, teacher logits `[N, V]`) -> `[N]`; one that has an argument
            named `labels` is given them, `[N]`.
        temperature: Both models' logits are divided by it.
        scaling: What the value is multiplied with: none, the temperature (T), or its square (T2),
            which keeps the size of the gradient as the temperature grows.
        target: What the student should reach: the teacher, or `Taid`, which starts near the student
            and moves to the teacher.
        exit: The student's layer that learns, 1 its first block, through its own final norm and
            head: the student can stop there afterwards. By default the last.

    Raises:
        ValueError: For a temperature that is not a finite number > 0, an unknown scaling, or a loss
            that does not return one value per row.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T2); Zhang et al. 2019 (Be Your
    Own Teacher), arXiv 1905.08094 (exits).
    """

    loss: Callable[[Tensor, Tensor], Tensor] = forward_kl
    temperature: float = 1.0
    scaling: Scaling = "T2"
    target: Taid | None = None
    exit: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature >= COLDEST):
            raise ValueError(
                f"Logits: temperature is {self.temperature}; it must be a finite number > 0, at "
                f"least {COLDEST:g}"
            )
        if not (self.target is None or isinstance(self.target, Taid)):
            raise ValueError(f"Logits: target is {self.target!r}; write Taid(), or leave it out")
        _check_exit("Logits", self.exit)
        check_choice("Logits: scaling", self.scaling, ("none", "T", "T2"))
        labels = {"labels": torch.tensor([0, 1])} if takes_labels(self.loss) else {}
        check_row_function(self.loss, (2, 3), "Logits", **labels)

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> HeadTerm:
        """Bind to the vocabulary the two models share."""
        del evidence
        row = Tempered(
            loss=self.loss,
            width=min(student.vocabulary, teacher.vocabulary),
            temperature=self.temperature,
            factor=self.temperature ** {"none": 0, "T": 1, "T2": 2}[self.scaling],
        )
        term = HeadTerm(row) if self.target is None else MovingTerm(row, self.target)
        return at_exit(term, self.exit, student)

    def describe(self) -> str:
        """Loss and temperature."""
        told = [describe_function(self.loss)]
        if self.temperature != 1:
            told += [f"temperature {self.temperature:g}", f"scaling {self.scaling}"]
        if self.target is not None:
            told.append(self.target.describe())
        if self.exit is not None:
            told.append(f"exit {self.exit}")
        return ", ".join(told)


def _check_exit(owner: str, layer: object) -> None:
    """Refuse what is no number of a layer.

    Raises:
        ValueError: Saying what to write.
    """
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
        raise ValueError(
            f"{owner}: exit is {layer!r}; write the number of one of the student's layers, 1 the "
            "first block, or leave it out for the last"
        )


def at_exit(term: HeadTerm, layer: int | None, student: ModelSpec) -> HeadTerm:
    """A term on an exit of the student; as it is for None.

    Raises:
        ValueError: For a layer that the student does not have, or that is its last.
    """
    if layer is None:
        return term
    if not 1 <= layer < student.depth:
        raise ValueError(
            f"exit: {layer} of {student.name}, which has {student.depth} blocks; write a layer "
            f"from 1 to {student.depth - 1}, or leave it out for the last"
        )
    term.exit, term.student = layer, Request(exits=frozenset({layer}))
    return term


def row_wise(function: Callable[[Tensor, Tensor], Tensor]) -> HeadTerm:
    """A term from a function of two logit blocks, for objectives of one's own.

    Args:
        function: (student logits `[n, V]`, teacher logits `[n, V]`) -> `[n]`.
    """
    return HeadTerm(Tempered(function))
