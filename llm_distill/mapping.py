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
    looks,
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


def member_of(objective: Objective) -> int | None:
    """Which of several teachers an objective reads; None where there is one, or it reads all."""
    return objective.member if isinstance(objective, Mapped) else None


def members_of(objectives: Sequence[Objective]) -> list[int | None]:
    """The members that objectives name, each once; None among them for the teacher itself."""
    return list(dict.fromkeys(map(member_of, objectives)))


def check_members(objectives: Sequence[Objective], teacher: ModelSpec) -> None:
    """Refuse hints that do not say whose layers they want, or name nobody.

    Raises:
        InputError: Naming the objective and the members; also for a map of a member that a race
            decides or that follows the student.
    """
    for objective in objectives:
        if not isinstance(objective, Mapped):
            continue
        name, member, there = type(objective).__name__, objective.member, len(teacher.members)
        if member is None and not there:
            continue
        if member is None or not (isinstance(member, int) and 0 <= member < there):
            asked = "no member" if member is None else f"member {member!r}"
            told = ", ".join(f"{k} ({spec.name})" for k, spec in enumerate(teacher.members))
            instead = f"write member: one of {told}" if told else "there is one: leave it out"
            raise InputError(f"{name}: {asked} of the teacher {teacher.name}; {instead}")
        if "race" in objective.undecided or looks(objective.layers):
            raise InputError(
                f"{name}: layers of a member are compared once; auto_race and refresh are for "
                "one teacher: write layers: auto"
            )


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
    tried = tuple(objectives)
    for member in members_of(objectives):
        alike = _alike(student, teacher.member(member))
        tried = settled(tried, student, teacher, alike, member=member)
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
    *,
    member: int | None = None,
) -> tuple[Objective, ...]:
    """The objectives with the maps that the evidence decides; those that wait for a race stay.

    Args:
        objectives: All; those that read other teachers than the one of the evidence stay as well.
        student: Its depth counts.
        teacher: The same.
        evidence: Of the two.
        member: Which of several teachers it is of.

    Raises:
        InputError: For evidence that a strategy cannot work with.
    """
    return tuple(
        _decided(objective, student, teacher.member(member), evidence)
        if isinstance(objective, Mapped)
        and objective.member == member
        and objective.undecided - {"race"}
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


def told_fading(given: Sequence[Objective], objectives: Sequence[Objective]) -> tuple[str, ...]:
    """What to tell of hints that were made to fade."""
    faded = [
        type(b).__name__ for a, b in zip(given, objectives, strict=True) if a.weight != b.weight
    ]
    if not faded:
        return ()
    return (
        f"{', '.join(faded)}: fading to 0 at {FADED:.0%} of the training, since the student starts "
        "from random weights; a schedule of your own is taken as it is",
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
    ours, theirs = Request(), Request()
    for member in members_of(objectives):
        own = [objective for objective in objectives if member_of(objective) == member]
        of_student, of_teacher = _requests(own, student, teacher.member(member))
        ours, theirs = ours | of_student, theirs | of_teacher.within(member)
    return ours, theirs


def _requests(
    objectives: Sequence[Objective], student: ModelSpec, teacher: ModelSpec
) -> tuple[Request, Request]:
    """The same of objectives that read one teacher."""
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
