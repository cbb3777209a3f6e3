"""Bootstrap, ranks and verdicts against hand numbers."""

from __future__ import annotations

import math

import pytest

from scripts.bench.mapping.statistics import (
    Difference,
    difference,
    goal,
    interval,
    spearman,
    verdict,
)

BETTER = Difference(-2.0, -3.0, -1.0, 8)
SAME = Difference(0.1, -0.3, 0.4, 8)
UNSURE = Difference(0.1, -0.8, 0.9, 8)
WORSE = Difference(2.0, 1.0, 3.0, 8)


def test_a_constant_factor_has_no_uncertainty() -> None:
    theirs = [[1.0, 2.0, 6.0], [2.0, 3.0, 1.0]]
    found = difference([[0.9 * x for x in row] for row in theirs], theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((-10.0, -10.0, -10.0))
    assert found.seeds == 2


def test_seeds_alone_have_the_bootstrap_of_a_coin() -> None:
    # Two seeds, one document: each draw is (0, 0), (0, 1), (1, 0) or (1, 1), so the ratio is 0 %,
    # 5 % or 10 %, and 2.5 % are beyond either end.
    found = difference([[1.0], [1.1]], [[1.0], [1.0]])
    assert found.mean == pytest.approx(5.0)
    assert (found.low, found.high) == pytest.approx((0.0, 10.0))


def test_documents_are_drawn_for_both_arms_at_once() -> None:
    # 200 documents whose values differ by a factor of 1000; the paired ratio is 0.99 to 1.01.
    theirs = [[10.0 ** (k % 4) for k in range(200)]]
    ours = [[x * (1.01 if k % 2 else 0.99) for k, x in enumerate(theirs[0])]]
    found = difference(ours, theirs)
    assert -1.0 <= found.low <= found.mean <= found.high <= 1.0
    assert found.high - found.low < 1.0


def test_width_follows_the_number_of_seeds() -> None:
    few = difference([[1.0], [1.2]] * 2, [[1.0]] * 4)
    many = difference([[1.0], [1.2]] * 32, [[1.0]] * 64)
    # 1.96 standard errors of a mean of 64 values that are 10 % from it: 2.45 %.
    assert many.high - many.mean == pytest.approx(100 * 1.96 * 0.1 / math.sqrt(64), rel=0.15)
    assert few.high - few.low > many.high - many.low


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="no pairs of seeds x documents"):
        difference([[1.0, 2.0]], [[1.0]])


def test_interval_of_a_mean() -> None:
    assert interval([[2.0, 4.0]]) == (3.0, 3.0)
    low, high = interval([[0.0], [1.0]])
    assert (low, high) == (0.0, 1.0)


def test_ranks_by_hand() -> None:
    assert spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1.0)
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0
    # Ties share their rank: 1 2.5 2.5 4 against 1 2 3 4 is sqrt(0.9).
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(math.sqrt(0.9))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (BETTER, "auto is better than the best map by hand (last): -2.00 [-3.00, -1.00] % over 8"),
        (SAME, "auto is as good as"),
        (UNSURE, "auto is **not shown** to be as good as"),
        (WORSE, "auto is **worse** than"),
        (None, "auto: not finished."),
    ],
)
def test_verdict(found: Difference | None, said: str) -> None:
    assert verdict("auto", found, "last").startswith(said)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([BETTER, SAME, SAME], "reached"),
        ([SAME, SAME], "**not reached**: as good on every pair, better on none"),
        ([BETTER, UNSURE, WORSE], "**not reached**: not shown to be as good on 2 of 3 pairs"),
        ([BETTER, None], "not decided: some pairs are not finished"),
        ([], "not decided: some pairs are not finished"),
    ],
)
def test_goal(found: list[Difference | None], said: str) -> None:
    assert goal(found) == said


def test_the_margin_is_half_a_percent() -> None:
    assert Difference(0.0, -0.5, 0.499, 8).as_good
    assert not Difference(0.0, -0.5, 0.5, 8).as_good
    assert not Difference(-1.0, -2.0, 0.0, 8).better
