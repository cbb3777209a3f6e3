"""Maps that follow the student: by how much, how far, and with what certainty."""

from functools import partial
from typing import Any

import pytest
import torch

from llm_distill.layers import (
    LayerMap,
    Row,
    Similarity,
    auto,
    cka,
    looks,
    random,
    refreshed,
    stays,
    transport,
    uniform,
)

SAME = Similarity(torch.ones(7, 7), torch.zeros(7, 7))


def seen(peaks: dict[int, int], *, error: float = 0.01, teacher: int = 6) -> Similarity:
    """Every student layer like one of the teacher's, 0.5 with the others."""
    values = torch.full((len(peaks) + 1, teacher + 1), 0.5)
    for s, t in peaks.items():
        values[s, t] = 0.9
    return Similarity(values, torch.full_like(values, error))


def of(*targets: int, teacher: int = 6) -> LayerMap:
    return LayerMap.of(enumerate(targets, start=1), len(targets), teacher, "by hand")


def test_a_certain_gain_moves_the_map_and_is_written_down() -> None:
    found, why = refreshed(of(2, 4, 6), of(3, 4, 6), seen({1: 3, 2: 4, 3: 6}))
    assert (found.pairs, why) == (((1, 3), (2, 4), (3, 6)), None)
    figures = dict(found.evidence)
    assert figures["gain in mean similarity at the last move"] == pytest.approx(0.4 / 3)
    assert figures["standard error of the gain"] == pytest.approx(0.01 * 2**0.5 / 3)


@pytest.mark.parametrize(("error", "moves"), [(0.14, True), (0.142, False)])
def test_a_gain_has_to_be_beyond_two_standard_errors(error: float, moves: bool) -> None:
    """0.4 in one row against two errors of sqrt(2) times that of one similarity."""
    current, proposed = of(2, 4, 6), of(3, 4, 6)
    found, why = refreshed(current, proposed, seen({1: 3, 2: 4, 3: 6}, error=error))
    assert (found is not current) == moves
    assert moves or (why is not None and "two standard errors" in why)


def test_a_loss_does_not_move_it() -> None:
    current = of(3, 4, 6)
    found, why = refreshed(current, of(2, 4, 6), seen({1: 3, 2: 4, 3: 6}))
    assert found is current
    assert why == "it gains -0.13, and two standard errors are 0.0094"


@pytest.mark.parametrize(("target", "moves"), [(3, True), (4, False)])
def test_no_row_moves_further_than_the_depths_allow(target: int, moves: bool) -> None:
    current = of(1, 5, 6)
    found, why = refreshed(current, of(target, 5, 6), seen({1: target, 2: 5, 3: 6}))
    assert (found is not current) == moves
    assert moves or why == "student layer 1 would move by 3 blocks, and Lt / Ls is 2"


def test_the_same_map_is_nothing_to_speak_of() -> None:
    current = of(2, 4, 6)
    assert refreshed(current, of(2, 4, 6), seen({1: 3, 2: 4, 3: 6})) == (current, None)


def test_rows_of_other_student_layers_are_another_objective() -> None:
    current, proposed = of(2, 4, 6), LayerMap.of([(2, 4), (3, 6)], 3, 6, "by hand")
    found, why = refreshed(current, proposed, seen({1: 3, 2: 4, 3: 6}))
    assert (found is current, why) == (True, "it has rows of other student layers")


def test_mixtures_move_by_their_mean_layer_and_gain_by_their_shares() -> None:
    def mixed(*shares: tuple[int, float]) -> LayerMap:
        return LayerMap((Row(1, shares), Row(2, ((6, 1.0),))), 2, 6, "by hand")

    now = seen({1: 5, 2: 6})
    current, proposed = mixed((2, 0.5), (3, 0.5)), mixed((3, 0.5), (5, 0.5))
    found, _ = refreshed(current, proposed, now)
    assert found.rows == proposed.rows
    figures = dict(found.evidence)
    assert figures["gain in mean similarity at the last move"] == pytest.approx(0.5 * 0.4 / 2)
    assert figures["standard error of the gain"] == pytest.approx(0.01 * 0.5**0.5 / 2)
    assert refreshed(mixed((1, 1.0)), mixed((5, 1.0)), now)[1] is not None  # by 4 > 6 / 2


def test_what_strategies_ask_for() -> None:
    assert [looks(s) for s in (cka, auto, random, uniform(2, 4))] == [0, 0, 0, 0]
    assert looks(partial(transport, refresh=7)) == 7
    assert [stays(s) for s in (cka, partial(cka, refresh=7), random, partial(random, epoch=1))] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("strategy", [cka, transport])
@pytest.mark.parametrize("steps", [-1, 2.5, True, "often"])
def test_no_number_of_steps_is_refused(strategy: Any, steps: Any) -> None:
    evidence = {"cross": SAME} | ({"similarity": SAME} if strategy is cka else {})
    with pytest.raises(ValueError, match=r"has refresh .*; write the steps between two looks"):
        strategy(6, 6, refresh=steps, **evidence)
