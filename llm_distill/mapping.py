"""From layer strategies to layer maps: what is known at once, and what data have to say first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from llm_distill.errors import InputError
from llm_distill.layers import (
    LayerEvidence,
    Similarity,
    asks,
    auto,
    decide,
    race_settings,
    uniform,
)
from llm_distill.objectives import HiddenStates, Mapped, Objective
from llm_distill.schedules import linear
from llm_distill.signals import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.rows import RowKind
    from llm_distill.signals import ModelSpec

FADED = 0.6
"""Share of the training after which hints are gone for a student that starts from random weights:
they help it to start and hold it back later (Yu et al. 2025, arXiv 2502.04499, tables of random
initialisation)."""


def undecided(objectives: Sequence[Objective]) -> frozenset[str]:
    """What layer strategies still have to be told (`llm_distill.layers.asks`)."""
    found: frozenset[str] = frozenset()
    for objective in objectives:
        if isinstance(objective, Mapped):
            found |= objective.undecided
    return found


def known(
    objectives: Sequence[Objective], student: ModelSpec, teacher: ModelSpec
) -> tuple[Objective, ...]:
    """The objectives with every map that follows from the two configs alone.

    Raises:
        InputError: For a map that fits neither, or a student that was not cut from a teacher where
            the strategy asks from which layers.
    """
    # What waits for data is decided once on layers that are all alike, to refuse bad settings now.
    tried = settled(objectives, student, teacher, _alike(student, teacher))
    early = {"blocks"}
    return tuple(
        made if isinstance(objective, Mapped) and objective.undecided == early else objective
        for objective, made in zip(objectives, tried, strict=True)
    )


def _alike(student: ModelSpec, teacher: ModelSpec) -> LayerEvidence:
    """Evidence of layers that are all alike."""
    ours, theirs = torch.ones(student.depth + 1, 1), torch.ones(teacher.depth + 1, 1)
    similarity, cross = theirs * theirs.T, ours * theirs.T
    return LayerEvidence(
        Similarity(similarity, similarity), Similarity(cross, cross), student.blocks
    )


def settled(
    objectives: Sequence[Objective],
    student: ModelSpec,
    teacher: ModelSpec,
    evidence: LayerEvidence,
) -> tuple[Objective, ...]:
    """The objectives with the maps that the evidence decides; those that wait for a race stay.

    Raises:
        InputError: For evidence that a strategy cannot work with.
    """
    return tuple(
        _decided(objective, student, teacher, evidence)
        if isinstance(objective, Mapped) and objective.undecided - {"race"}
        else objective
        for objective in objectives
    )


def with_rows(objectives: Sequence[Objective], student: ModelSpec) -> tuple[Objective, ...]:
    """Hidden states with the rows that nobody named.

    A masked model predicts one token in seven and has a state at each of them: hints at the masked
    ones alone waste most of what the teacher says.
    """
    rows: RowKind = "valid" if student.masked else "supervised"
    return tuple(
        replace(o, rows=rows) if isinstance(o, HiddenStates) and o.rows is None else o
        for o in objectives
    )


def fading(objectives: Sequence[Objective], student: ModelSpec) -> tuple[Objective, ...]:
    """Hints with a plain weight, fading out where the student starts from random weights.

    A schedule, `constant` among them, is taken as it is written.
    """
    if not student.fresh:
        return tuple(objectives)
    return tuple(
        replace(
            objective,
            weight=partial(linear, start=float(objective.weight), end=0.0, until=_faded(objective)),
        )
        if isinstance(objective, Mapped) and not callable(objective.weight) and objective.fades
        else objective
        for objective in objectives
    )


def _faded(objective: Mapped) -> float:
    """When a hint is gone: not while nothing else is trained."""
    alone = objective.blockwise if isinstance(objective, HiddenStates) else 0.0
    return max(FADED, alone)


def requests(
    objectives: Sequence[Objective], student: ModelSpec, teacher: ModelSpec
) -> tuple[Request, Request]:
    """What strategies ask to be shown of both models: `[student, teacher]`.

    Hidden states that are compared; under a race the teacher's logits, which judge it.
    """
    asked = undecided(objectives) | _raced(objectives)
    every = Request(hidden=frozenset(range(teacher.depth + 1)))
    ours = Request(hidden=frozenset(range(student.depth + 1)))
    if "race" in asked:
        every = every | Request(logits=True)
    if "cross" in asked:
        return ours, every
    return Request(), every if asked & {"similarity", "race"} else Request()


def _raced(objectives: Sequence[Objective]) -> frozenset[str]:
    """What the maps that a user adds to a race have to be told.

    Raises:
        InputError: For settings of a race that are out of range.
    """
    found: frozenset[str] = frozenset()
    for objective in objectives:
        try:
            settings = race_settings(objective.layers) if isinstance(objective, Mapped) else None
        except ValueError as error:
            raise InputError(str(error)) from error
        for strategy in settings.also if settings else ():
            found |= asks(strategy)
    return found


def _decided(
    objective: Mapped, student: ModelSpec, teacher: ModelSpec, evidence: LayerEvidence
) -> Objective:
    """An objective on the map its strategy gives."""
    depths = student.depth, teacher.depth
    strategy = objective.layers
    plain = strategy.func if isinstance(strategy, partial) else strategy
    if plain is auto and evidence.similarity is None:
        origin = "auto: too few training data to compare layers, so uniform"
        return objective.with_map(replace(uniform(*depths), origin=origin))
    try:
        return objective.with_map(decide(strategy, *depths, evidence))
    except ValueError as error:
        raise InputError(f"{type(objective).__name__}: {error}") from error
