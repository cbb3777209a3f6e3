"""What layer strategies ask for beyond the two depths, and the decision when it is there.

A strategy asks by a keyword of one of the names in `ASKED`, with the default None (`epoch`: 0).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from llm_distill.layers.map import LayerMap, LayerStrategy
from llm_distill.layers.similarity import Similarity

Told = TypeVar("Told")

ASKED = {
    "similarity": "how similar the teacher's layers are to each other, and that was not measured: "
    "calibration does, on sets of training data; write uniform, or a map of your own",
    "cross": "how similar the student's layers are to the teacher's, and that was not measured: "
    "calibration does, on sets of training data; write uniform, or a map of your own",
    "blocks": "the teacher blocks that the student was cut from, and this student was not cut from "
    "its teacher; write FromTeacher as the student, give blocks: [1, …], or write auto",
    "epoch": "the epoch",
    "race": "the winner of a race, and none was run: a race decides it when training starts; where "
    "there is none, write auto",
}
"""What each keyword stands for, and what to write where it is missing."""


@dataclass(frozen=True)
class LayerEvidence:
    """What is known of two models; None: nothing.

    Attributes:
        similarity: Teacher layers with teacher layers, `[Lt + 1, Lt + 1]`.
        cross: Student layers with teacher layers, `[Ls + 1, Lt + 1]`.
        blocks: The teacher block, 1..Lt, that each student block was copied from.
    """

    similarity: Similarity | None = None
    cross: Similarity | None = None
    blocks: Sequence[int] | None = None


def asks(strategy: LayerStrategy) -> frozenset[str]:
    """Which names of `ASKED` a strategy still has to be told.

    >>> from llm_distill.layers import LayerMap, cka, random, uniform
    >>> sorted(asks(cka)), sorted(asks(random)), asks(uniform)
    (['cross', 'similarity'], ['epoch'], frozenset())
    >>> asks(partial(random, epoch=3)), asks(uniform(2, 4))
    (frozenset(), frozenset())
    """
    bound = strategy.keywords if isinstance(strategy, partial) else {}
    told = {name for name, value in bound.items() if value is not None}
    return frozenset(inspect.signature(strategy).parameters) & frozenset(ASKED) - told


def decide(
    strategy: LayerStrategy, student_depth: int, teacher_depth: int, evidence: LayerEvidence
) -> LayerMap:
    """The map of a strategy that is told what it asks for (`epoch` is left at the first).

    Raises:
        ValueError: If it asks for what is None, or cannot work with it.
    """
    known = {
        "similarity": evidence.similarity,
        "cross": evidence.cross,
        "blocks": evidence.blocks,
    }
    told = {
        name: given(value, _name_of(strategy), name)
        for name, value in known.items()
        if name in asks(strategy)
    }
    return cast("Callable[..., LayerMap]", strategy)(student_depth, teacher_depth, **told)


def given(value: Told | None, strategy: str, name: str) -> Told:
    """A value that is there.

    Raises:
        ValueError: If it is None; says what the strategy asks for and what to write instead.
    """
    if value is None:
        raise ValueError(f"layers: {strategy} goes by {ASKED[name]}")
    return value


def figures(similarity: Similarity, rows: int, columns: int, name: str) -> list[list[float]]:
    """The values of a matrix for layers 0..rows and 0..columns.

    Raises:
        ValueError: If it has another shape, or a value that is not finite.
    """
    shape = tuple(similarity.values.shape)
    if shape != (rows + 1, columns + 1):
        raise ValueError(
            f"layers: {name} has shape {list(shape)}; these depths need "
            f"[{rows + 1}, {columns + 1}], the embedding included"
        )
    if not similarity.values.isfinite().all():
        raise ValueError(f"layers: {name} has values that are not finite; measure it again")
    found: list[list[float]] = similarity.values.double().tolist()
    return found


def _name_of(strategy: LayerStrategy) -> str:
    """The function's name, or that of its class."""
    function = strategy.func if isinstance(strategy, partial) else strategy
    return function.__name__ if inspect.isfunction(function) else type(function).__name__
