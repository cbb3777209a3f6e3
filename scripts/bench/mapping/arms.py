"""The arms: maps by hand, maps from data, and what is measured beside them."""

from __future__ import annotations

import random as stdlib_random
from functools import partial
from typing import TYPE_CHECKING

from llm_distill.layers import (
    LayerMap,
    arc_length,
    auto,
    cka,
    coverage,
    decide,
    first,
    last,
    provenance,
    random,
    reverse,
    segmentation,
    skip,
    transport,
    uniform,
)

if TYPE_CHECKING:
    from llm_distill.layers import LayerEvidence, LayerStrategy

DRAWS = 3
"""Random maps among the arms."""

STRATEGIES: dict[str, LayerStrategy] = {
    "uniform": uniform,
    "last": last,
    "skip": skip,
    "first": first,
    "reverse": reverse,
    **{f"random {k}": partial(random, seed=k) for k in range(DRAWS)},
    "provenance": provenance,
    "arc_length": arc_length,
    "segmentation": segmentation,
    "coverage": coverage,
    "cka": cka,
    "transport": transport,
    "auto": auto,
}
"""Under the names of the arms; all random ones stay as they are drawn."""


def decided(
    student_depth: int, teacher_depth: int, evidence: LayerEvidence, maps: int
) -> dict[str, LayerMap]:
    """Every map, and some random rising ones (`drawn 0`, …).

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        evidence: Of a calibration; provenance is left out for students that were not cut.
        maps: Random rising ones, the last layer on the last.
    """
    found = {}
    for name, strategy in STRATEGIES.items():
        if name != "provenance" or evidence.blocks is not None:
            found[name] = decide(strategy, student_depth, teacher_depth, evidence)
    for place, pairs in enumerate(drawn(student_depth, teacher_depth, maps)):
        found[f"drawn {place}"] = LayerMap.of(pairs, student_depth, teacher_depth, "drawn")
    return found


def drawn(student_depth: int, teacher_depth: int, count: int) -> list[list[tuple[int, int]]]:
    """Different rising maps with the last layer on the last, as many as there are at most.

    >>> drawn(2, 3, 9)
    [[(1, 2), (2, 3)], [(1, 1), (2, 3)]]
    """
    draw = stdlib_random.Random(0)
    found: list[list[int]] = []
    for _ in range(100 * count):
        ends = [*sorted(draw.sample(range(1, teacher_depth), student_depth - 1)), teacher_depth]
        if ends not in found and len(found) < count:
            found.append(ends)
    return [list(enumerate(ends, start=1)) for ends in found]
