"""Who takes part in a race: the maps that were ever found best, the user's own, and no hint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from llm_distill import schedules
from llm_distill.errors import InputError
from llm_distill.layers import (
    LayerEvidence,
    LayerStrategy,
    RaceSettings,
    asks,
    coverage,
    decide,
    last,
    provenance,
    race_settings,
    uniform,
)
from llm_distill.layers.map import LayerMap
from llm_distill.losses.described import describe_function
from llm_distill.objectives import HiddenStates, Mapped
from llm_distill.race.halving import Arm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_distill.objectives import Objective

BLOCKWISE = 1 / 3
"""Share of the training in which every block learns alone, in the arm that tries it."""

FROM_DATA = frozenset({"similarity", "cross"})
"""What strategies ask for that is known after calibration only."""

SCALED = ("value", "start", "end", "before", "after")
"""Arguments of our schedules that are weights."""


@dataclass(frozen=True)
class Proposal:
    """A map that may take part.

    Attributes:
        name: For the table.
        mapping: Which layers; None where data decide it and were not seen yet.
        own: Whether the user asked for it.
    """

    name: str
    mapping: LayerMap | None
    own: bool = False


def races(objective: Objective) -> bool:
    """Whether a race decides the map of an objective."""
    return isinstance(objective, Mapped) and "race" in objective.undecided


def settings_of(objectives: Sequence[Objective]) -> RaceSettings | None:
    """What the objectives want to race: one race finds one map for all; None: nothing.

    Raises:
        InputError: If they do not agree, or a setting is out of range.
    """
    strategies = [o.layers for o in objectives if isinstance(o, Mapped) and races(o)]
    try:
        found = [race_settings(strategy) for strategy in strategies]
    except ValueError as error:
        raise InputError(str(error)) from error
    for strategy, settings in zip(strategies, found, strict=True):
        if settings is None:
            raise InputError(
                f"layers: {describe_function(strategy)} asks for `race`, and only auto_race runs "
                "one; write auto_race with also: [your strategy]"
            )
    if len({repr(settings) for settings in found}) > 1:
        raise InputError(
            "auto_race: several objectives ask for races with different settings; one race finds "
            "one map for all: write the same weights, share and also"
        )
    return found[0] if found else None


def proposals(
    settings: RaceSettings,
    depths: tuple[int, int],
    evidence: LayerEvidence,
    *,
    seen: bool,
) -> list[Proposal]:
    """Every map that may take part, once.

    Args:
        settings: The user's own maps.
        depths: Of student and teacher.
        evidence: How similar the layers are, and what the student was cut from.
        seen: Whether the data were seen: if not, what asks for them is without a map.

    Raises:
        InputError: For a map of the user's that cannot be.
    """
    made: list[Proposal] = []
    if evidence.blocks is not None:
        made += _ours("provenance", provenance, depths, evidence)
    if evidence.similarity is not None:
        made += _ours("coverage", coverage, depths, evidence)
    elif not seen:
        made.append(Proposal("coverage", None))
    plain = {"last": last, "middle and last": _middle, "uniform": uniform}
    for name, strategy in plain.items():
        made += _ours(name, strategy, depths, evidence)
    made += [_users(strategy, depths, evidence, seen=seen) for strategy in settings.also]
    return _distinct(made)


def candidates(
    proposed: Sequence[Proposal],
    settings: RaceSettings,
    *,
    alone: bool,
    blockwise: bool,
    fit: Callable[[Arm], None],
) -> list[Arm]:
    """The arms of the first round.

    Args:
        proposed: Those without a map are left out.
        settings: Weights.
        alone: Whether there is no other objective, so that without a hint nothing is trained.
        blockwise: Whether blocks can learn alone.
        fit: Raises `InputError` for an arm that the objectives cannot be built with. One that
            nobody asked for is left out then.

    Raises:
        InputError: For a map of the user's that the objectives cannot be built with.
    """
    middle = settings.weights[len(settings.weights) // 2]
    arms = []
    for proposal in proposed:
        arm = Arm(proposal.name, proposal.mapping, middle)
        if proposal.mapping is not None and (proposal.own or _fits(arm, fit)):
            arms.append(arm)
            if proposal.own:
                _refuse_unfit(arm, fit)
    starts = [arm for arm in arms if arm.name in ("provenance", "coverage", "uniform")]
    forced = [replace(arm, blockwise=BLOCKWISE) for arm in starts[:1] if blockwise]
    arms += [arm for arm in forced if _fits(arm, fit)]
    return arms if alone else [*arms, Arm("none", None)]


def can_start_alone(objectives: Sequence[Objective]) -> bool:
    """Whether an arm may let blocks learn alone: only one objective can say where they begin."""
    hidden = [o for o in objectives if isinstance(o, HiddenStates)]
    return any(races(o) for o in hidden) and not any(o.blockwise for o in hidden)


def with_arm(objectives: Sequence[Objective], arm: Arm) -> tuple[Objective, ...]:
    """The objectives as an arm has them: those that race on its map, or gone."""
    made: list[Objective] = []
    blockwise = arm.blockwise
    for objective in objectives:
        if not (isinstance(objective, Mapped) and races(objective)):
            made.append(objective)
        elif arm.mapping is not None:
            weight = scaled(objective.weight, arm.weight)
            changed = replace(objective.with_map(arm.mapping), weight=weight)
            if isinstance(changed, HiddenStates) and blockwise:
                changed, blockwise = replace(changed, blockwise=blockwise), 0.0
            made.append(changed)
    return tuple(made)


def scaled(weight: float | schedules.Schedule, by: float) -> float | schedules.Schedule:
    """A weight, constant or not, times a number.

    >>> scaled(0.5, 3.0)
    1.5
    >>> schedules.describe(scaled(partial(schedules.linear, start=1.0, end=0.0), 3.0))
    'linear(start=3.0, end=0.0)'
    """
    if by == 1:
        return weight
    if not callable(weight):
        return float(weight) * by
    ours = (schedules.constant, schedules.linear, schedules.cosine, schedules.step)
    if isinstance(weight, partial) and weight.func in ours and not weight.args:
        changed = {key: weight.keywords[key] * by for key in SCALED if key in weight.keywords}
        return partial(weight.func, **{**weight.keywords, **changed})
    return partial(times, weight=weight, by=by)


def times(progress: float, *, weight: schedules.Schedule, by: float) -> float:
    """A schedule times a number."""
    return weight(progress) * by


def _ours(
    name: str, strategy: LayerStrategy, depths: tuple[int, int], evidence: LayerEvidence
) -> list[Proposal]:
    """A map that nobody asked for, where there is one for these models."""
    try:
        return [Proposal(name, decide(strategy, *depths, evidence))]
    except ValueError:
        return []


def _users(
    strategy: LayerStrategy, depths: tuple[int, int], evidence: LayerEvidence, *, seen: bool
) -> Proposal:
    """A map of the user's."""
    name = strategy.origin if isinstance(strategy, LayerMap) else describe_function(strategy)
    asked = asks(strategy)
    if "race" in asked:
        raise InputError(f"auto_race: also names {name}, a race in a race; leave it out")
    if asked & FROM_DATA and not seen:
        return Proposal(name, None, own=True)
    try:
        return Proposal(name, decide(strategy, *depths, evidence), own=True)
    except ValueError as error:
        raise InputError(f"auto_race: also: {name}: {error}") from error


def _distinct(made: Sequence[Proposal]) -> list[Proposal]:
    """Each map once, under the name it had first; no two of one name."""
    found: list[Proposal] = []
    for one in made:
        same = [other for other in found if _alike(one.mapping, other.mapping)]
        if not same:
            count = sum(one.name == other.name.partition(" #")[0] for other in found)
            name = f"{one.name} #{count + 1}" if count else one.name
            found.append(replace(one, name=name))
        elif one.own and not same[0].own:  # asked for after all
            found[found.index(same[0])] = replace(same[0], own=True)
    return found


def _alike(one: LayerMap | None, other: LayerMap | None) -> bool:
    """Whether two maps train the same."""
    return (
        one is not None
        and other is not None
        and (one.rows, one.trained) == (other.rows, other.trained)
    )


def _fits(arm: Arm, fit: Callable[[Arm], None]) -> bool:
    """Whether the objectives can be built with an arm."""
    try:
        fit(arm)
    except InputError:
        return False
    return True


def _refuse_unfit(arm: Arm, fit: Callable[[Arm], None]) -> None:
    """Refuse a map of the user's that the objectives cannot be built with."""
    try:
        fit(arm)
    except InputError as error:
        raise InputError(f"auto_race: also: {arm.name}: {error}") from error


def _middle(student_depth: int, teacher_depth: int) -> LayerMap:
    """The middle and the last layer of both."""
    pairs = [(student_depth, teacher_depth)]
    if student_depth > 1 and teacher_depth > 1:
        pairs.insert(0, (student_depth // 2, teacher_depth // 2))
    return LayerMap.of(tuple(pairs), student_depth, teacher_depth, "middle and last")
