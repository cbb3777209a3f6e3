"""Objectives that pair layers of the two models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from llm_distill.layers import LayerMap, LayerStrategy, asks, auto, uniform
from llm_distill.losses.described import describe_function
from llm_distill.objectives.base import Objective
from llm_distill.objectives.checks import check_function

if TYPE_CHECKING:
    from llm_distill.signals import ModelSpec

WHILE_TRAINING = frozenset({"epoch"})
"""What a strategy may ask for that no calibration gives: the map is drawn anew as it comes."""


@dataclass(frozen=True, kw_only=True)
class Mapped(Objective):
    """An objective with a layer map.

    Attributes:
        layers: Which layer of the student learns from which of the teacher: a strategy
            (`llm_distill.layers`), or a `LayerMap`. `auto` decides when the teacher has been seen.
        member: Whose layers they are, where the teacher is an `Ensemble`: 0 for its first member.
            One objective for each of them gives hints from all, each with its own map.
    """

    layers: LayerStrategy = auto
    member: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no strategy, such as a name that only a recipe may write."""
        super().__post_init__()
        check_function(type(self).__name__, "layers", self.layers, "llm_distill.layers")

    @property
    def fades(self) -> bool:
        """Whether a plain weight fades out where the student starts from random weights."""
        return True

    @property
    def undecided(self) -> frozenset[str]:
        """What the strategy has to be told before there is a map."""
        return asks(self.layers) - WHILE_TRAINING

    def with_map(self, mapping: LayerMap) -> Self:
        """The same objective on a decided map."""
        return replace(self, layers=mapping)

    def mapping(self, student: ModelSpec, teacher: ModelSpec) -> LayerMap:
        """The map for two models; a uniform one where data have to decide it first.

        Raises:
            ValueError: If it does not fit them.
        """
        if not self.undecided:
            return self.layers(student.depth, teacher.depth)
        origin = f"{describe_function(self.layers)}, decided at calibration; until then uniform"
        return replace(uniform(student.depth, teacher.depth), origin=origin)
