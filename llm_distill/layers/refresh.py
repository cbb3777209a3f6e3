"""Maps that follow the student while it trains, carefully."""

import inspect
import math
from dataclasses import replace

from llm_distill.layers.evidence import asks, figures
from llm_distill.layers.map import LayerMap, LayerStrategy, Row
from llm_distill.layers.similarity import Similarity

CERTAIN = 2.0
"""Standard errors that a move has to gain."""


def looks(strategy: LayerStrategy) -> int:
    """Steps between two looks at the student that a strategy asks for by `refresh`; 0: none.

    >>> from functools import partial
    >>> from llm_distill.layers import cka, uniform
    >>> looks(partial(cka, refresh=50)), looks(cka), looks(uniform)
    (50, 0, 0)
    """
    found = inspect.signature(strategy).parameters.get("refresh")
    number = None if found is None else found.default
    return number if isinstance(number, int) else 0


def stays(strategy: LayerStrategy) -> bool:
    """Whether a map is the same for the whole training.

    >>> from functools import partial
    >>> from llm_distill.layers import cka, random
    >>> stays(cka), stays(partial(cka, refresh=50)), stays(random)
    (True, False, False)
    """
    return "epoch" not in asks(strategy) and not looks(strategy)


def check_refresh(steps: int, owner: str) -> None:
    """Refuse what is no number of steps.

    Raises:
        ValueError: Naming the strategy.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(
            f"layers: {owner} has refresh {steps!r}; write the steps between two looks at the "
            "student, as 100, or 0 for a map that stays"
        )


def refreshed(
    current: LayerMap, proposed: LayerMap, cross: Similarity
) -> tuple[LayerMap, str | None]:
    """The map to go on with, after another look at the student.

    It moves if the mean similarity of its pairs gains more than two standard errors, those of
    single similarities taken as independent, and no row moves further than Lt / Ls teacher blocks
    (the mean of a mixture counts).

    Args:
        current: The map of the training.
        proposed: What its strategy says now.
        cross: Student layers with teacher layers, as they are now.

    Returns:
        The map, and why it did not become the proposed one, where that is another.

    >>> import torch
    >>> seen = torch.tensor([[1.0, 0.2, 0.1, 0.1], [0.2, 0.4, 0.9, 0.3], [0.1, 0.1, 0.3, 0.8]])
    >>> now = Similarity(seen, torch.full((3, 4), 0.01))
    >>> one, other = (LayerMap.of([(1, t), (2, 3)], 2, 3, "by hand") for t in (1, 2))
    >>> refreshed(one, other, now)[0].pairs, refreshed(other, one, now)[1]
    (((1, 2), (2, 3)), 'it gains -0.25, and two standard errors are 0.014')
    """
    if [row.teacher for row in proposed.rows] == [row.teacher for row in current.rows]:
        return current, None
    if [row.student for row in proposed.rows] != [row.student for row in current.rows]:
        return current, "it has rows of other student layers"
    furthest = current.teacher_depth / current.student_depth
    for ours, theirs in zip(current.rows, proposed.rows, strict=True):
        way = abs(_centre(theirs) - _centre(ours))
        if way > furthest:
            return current, (
                f"student layer {ours.student} would move by {way:.3g} blocks, and Lt / Ls is "
                f"{furthest:.3g}"
            )
    gain, error = _gain(current, proposed, cross)
    if not gain > CERTAIN * error:
        return current, f"it gains {gain:.2g}, and two standard errors are {CERTAIN * error:.2g}"
    evidence = (
        ("gain in mean similarity at the last move", gain),
        ("standard error of the gain", error),
    )
    return replace(proposed, evidence=(*proposed.evidence, *evidence)), None


def _centre(row: Row) -> float:
    """Mean teacher layer of a row."""
    return sum(share * layer for layer, share in row.teacher)


def _gain(current: LayerMap, proposed: LayerMap, cross: Similarity) -> tuple[float, float]:
    """What the mean similarity of the pairs gains, and the standard error of that."""
    depths = current.student_depth, current.teacher_depth
    values = figures(cross, *depths, "cross")
    errors = figures(replace(cross, values=cross.errors), *depths, "errors of cross")
    gain = variance = 0.0
    for ours, theirs in zip(current.rows, proposed.rows, strict=True):
        changed = dict(theirs.teacher)
        for layer, share in ours.teacher:
            changed[layer] = changed.get(layer, 0.0) - share
        for layer, share in changed.items():
            gain += share * values[ours.student][layer]
            variance += (share * errors[ours.student][layer]) ** 2
    return gain / len(current.rows), math.sqrt(variance) / len(current.rows)
