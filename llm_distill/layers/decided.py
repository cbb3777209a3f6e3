"""Layer maps from where the student came from, from training itself, and from a race."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llm_distill.layers.evidence import given
from llm_distill.layers.map import LayerMap, LayerStrategy, Row

SHORTEST = 15
"""Steps of the shortest training of a race, so that those of the last round have 60: with 24, it
took no hint in 8 of 8 races where one was worth 14 % (`scripts/bench/MAPPING.md`, b)."""

NARROWEST = 0.05
"""Of an order prior: below it shares at the far end are too small for a float."""


def provenance(
    student_depth: int, teacher_depth: int, *, blocks: Sequence[int] | None = None
) -> LayerMap:
    """For a student cut from its teacher: each block learns the end of the run it stands for.

    A block copied from teacher block t_i takes the place of t_i .. t_(i+1) - 1, so that its target
    is the last of them; the last block's is the last. The target t_i itself would hold it where it
    starts. Of several copies of one block the last one has the row.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        blocks: t_i of each student block, 1 is the teacher's first; known of a student that
            `FromTeacher` made.

    Raises:
        ValueError: If the student was not cut from a teacher, or the blocks are not one for each of
            its blocks, in 1..teacher_depth, never falling.

    Source: ours.

    >>> provenance(3, 12, blocks=[1, 5, 12]).pairs
    ((1, 4), (2, 11), (3, 12))
    """
    blocks = list(given(blocks, "provenance", "blocks"))
    if len(blocks) != student_depth or not all(1 <= b <= teacher_depth for b in blocks):
        raise ValueError(
            f"layers: provenance has blocks {blocks}; a student of {student_depth} blocks needs "
            f"{student_depth} numbers in 1..{teacher_depth}"
        )
    if blocks != sorted(blocks):
        raise ValueError(
            f"layers: provenance has blocks {blocks}, which fall; such a block stands for no run "
            "of the teacher: write auto, uniform or explicit"
        )
    starts = [*blocks[1:], teacher_depth + 1]
    pairs = [
        (s, start - 1)
        for s, (block, start) in enumerate(zip(blocks, starts, strict=True), start=1)
        if start > block
    ]
    return LayerMap.of(pairs, student_depth, teacher_depth, f"provenance, blocks {blocks}")


def learned(student_depth: int, teacher_depth: int, *, width: float = 0.15) -> LayerMap:
    """Every teacher block in every row, with shares that are trained.

    They start at a bell around the diagonal, `exp(-(s / Ls - t / Lt)^2 / (2 width^2))`: shares that
    follow the loss of the hint alone drift to whatever layer is easiest.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        width: Of the bell, as a fraction of the depth, >= 0.05.

    Raises:
        ValueError: If the width is below 0.05 or not finite.

    Source: Passban et al. 2020 (ALP-KD), arXiv 2012.14022, here with an order prior.

    >>> [round(share, 3) for _, share in learned(1, 3).rows[0].teacher]
    [0.0, 0.078, 0.922]
    """
    if not NARROWEST <= width < math.inf:
        raise ValueError(f"layers: learned has width {width}; write a number >= {NARROWEST}")
    rows = []
    for s in range(1, student_depth + 1):
        distances = [s / student_depth - t / teacher_depth for t in range(1, teacher_depth + 1)]
        bell = [math.exp(-(d * d) / (2 * width * width)) for d in distances]
        shares = tuple((t, share / sum(bell)) for t, share in enumerate(bell, start=1))
        rows.append(Row(s, shares))
    origin = f"learned, started at width {width:g}"
    return LayerMap(tuple(rows), student_depth, teacher_depth, origin, trained=True)


@dataclass(frozen=True)
class RaceSettings:
    """What `auto_race` is asked to race.

    Attributes:
        weights: Hint weights, each tried with each map.
        share: Of the training's steps that the race may take, a fraction in (0, 1).
        also: Strategies or maps to race beside the usual ones.
        shortest: Steps of a training of the first round at least, >= 1; those of the last round
            are four times as long.

    Raises:
        ValueError: If a setting is out of range.
    """

    weights: tuple[float, ...] = (1.0, 3.0, 10.0)
    share: float = 0.04
    also: tuple[LayerStrategy, ...] = ()
    shortest: int = SHORTEST

    def __post_init__(self) -> None:
        """Refuse what no race can run on."""
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"layers: auto_race has weights {list(self.weights)}; write numbers > 0, as "
                "[1, 3, 10] (the arm without a hint always runs)"
            )
        if not 0 < self.share < 1:
            raise ValueError(
                f"layers: auto_race has share {self.share}; write a fraction of the steps in "
                "(0, 1), as 0.04"
            )
        number = isinstance(self.shortest, int) and not isinstance(self.shortest, bool)
        if not number or self.shortest < 1:
            raise ValueError(
                f"layers: auto_race has shortest {self.shortest!r}; write a number of steps from 1 "
                f"on, as {SHORTEST}"
            )


def auto_race(
    student_depth: int,
    teacher_depth: int,
    *,
    race: LayerMap | None = None,
    weights: Sequence[float] = (1.0, 3.0, 10.0),
    share: float = 0.04,
    also: Sequence[LayerStrategy] = (),
    shortest: int = SHORTEST,
) -> LayerMap:
    """The map that wins a race of short trainings, on held-out KL to the teacher.

    This function only carries the settings; the race is run when training starts.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        race: The winner.
        weights: Hint weights, each tried with each map: they matter as much as the map.
        share: Of the training's steps that the race may take, a fraction in (0, 1).
        also: Strategies or maps to race beside the usual ones.
        shortest: Steps of a training of the first round at least; those of the last are four times
            as long.

    Raises:
        ValueError: If no race was run, the winner is for other depths, or a setting is out of
            range.

    Source: ours; successive halving is that of Jamieson and Talwalkar 2015, arXiv 1502.07943.
    """
    RaceSettings(tuple(weights), share, tuple(also), shortest)
    return given(race, "auto_race", "race")(student_depth, teacher_depth)


def race_settings(strategy: LayerStrategy) -> RaceSettings | None:
    """The settings of an `auto_race`, whether or not some are bound; None for other strategies.

    Raises:
        ValueError: If a setting is out of range.

    >>> race_settings(partial(auto_race, share=0.05)).share, race_settings(learned)
    (0.05, None)
    """
    function = strategy.func if isinstance(strategy, partial) else strategy
    if function is not auto_race:
        return None
    settings = {name: p.default for name, p in inspect.signature(strategy).parameters.items()}
    also = tuple(settings["also"])
    return RaceSettings(tuple(settings["weights"]), settings["share"], also, settings["shortest"])
