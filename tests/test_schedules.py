"""Schedules: values, ends, and weights that cannot be."""

import math
from collections.abc import Callable
from functools import partial

import pytest

from llm_distill import schedules
from llm_distill.schedules import at, check, constant, cosine, describe, linear, step


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_constant_is_constant(progress: float) -> None:
    assert constant(progress, value=0.3) == 0.3


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 2.0), (0.5, 0.5)])
def test_ends_and_middle(schedule: Callable[..., float], start: float, end: float) -> None:
    bound = partial(schedule, start=start, end=end)
    assert bound(0.0) == start
    assert bound(0.5) == pytest.approx((start + end) / 2)
    assert bound(1.0) == pytest.approx(end)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_until_is_where_the_end_is_reached_and_kept(schedule: Callable[..., float]) -> None:
    bound = partial(schedule, start=1.0, end=0.2, until=0.25)
    assert bound(0.125) == pytest.approx(0.6)
    assert [bound(p) for p in (0.25, 0.3, 1.0)] == pytest.approx([0.2] * 3)


def test_cosine_is_flat_at_its_ends() -> None:
    bound = partial(cosine, start=1.0, end=0.0)
    assert bound(0.01) > 0.9997
    assert bound(0.99) < 0.0003
    assert bound(0.25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("until", [0.0, -1.0, math.nan])
def test_until_is_a_share_of_the_training(schedule: Callable[..., float], until: float) -> None:
    bound = partial(schedule, start=1.0, end=0.0, until=until)
    with pytest.raises(ValueError, match="write a share of the training > 0"):
        bound(0.0)
    with pytest.raises(ValueError, match=r"Logits: weight .* at progress 0.0 \(until is"):
        check(bound, "Logits")


def test_step_has_two_stages() -> None:
    bound = partial(step, before=1.0, after=0.25, at=0.3)
    assert [bound(p) for p in (0.0, 0.2999, 0.3, 1.0)] == [1.0, 1.0, 0.25, 0.25]
    assert describe(bound) == "step(before=1.0, after=0.25, at=0.3)"
    check(bound, "HiddenStates")


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_a_step_is_within_the_training(share: float) -> None:
    """So both weights are seen by `check`, which looks at both ends."""
    bound = partial(step, before=1.0, after=0.0, at=share)
    with pytest.raises(ValueError, match="write a share of the training between 0 and 1"):
        bound(0.5)


@pytest.mark.parametrize(("before", "after"), [(-1.0, 1.0), (1.0, -1.0)])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_neither_weight_of_a_step_escapes_the_check(
    before: float, after: float, share: float
) -> None:
    with pytest.raises(ValueError, match=r"weight is -1.0 at progress \d"):
        check(partial(step, before=before, after=after, at=share), "HiddenStates")


def test_at_takes_numbers_and_schedules() -> None:
    assert at(2, 0.3) == 2.0
    assert at(partial(linear, start=0.0, end=1.0), 0.3) == pytest.approx(0.3)
    assert at(lambda progress: progress**2, 0.5) == 0.25


@pytest.mark.parametrize(
    "weight",
    [0, 0.0, 1.5, partial(linear, start=1.0, end=0.0), partial(cosine, start=0.7, end=1e-17)],
)
def test_possible_weights_pass(weight: float | schedules.Schedule) -> None:
    check(weight, "Logits")


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        (-0.1, "weight is -0.1 at progress 0.0"),
        (math.nan, "weight is nan at progress 0.0"),
        (math.inf, "weight is inf at progress 0.0"),
        (partial(linear, start=0.5, end=-0.5), "at progress 0.51"),
        (lambda progress: math.inf if progress > 0.9 else 1.0, "weight is inf at progress 0.91"),
    ],
)
def test_impossible_weights_are_refused(weight: float | schedules.Schedule, where: str) -> None:
    with pytest.raises(ValueError, match=f"Logits: .*{where}.*must be finite and >= 0"):
        check(weight, "Logits")


@pytest.mark.parametrize("weight", ["heavy", None, linear, lambda progress: "heavy"])
def test_what_gives_no_number_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"Logits: weight .* gives no number.*write a number"):
        check(weight, "Logits")


class Steps:
    """A schedule of a user's own."""

    def __call__(self, progress: float) -> float:
        return float(progress > 0.5)

    def __repr__(self) -> str:
        return "Steps()"


def test_describe() -> None:
    assert describe(1.0) == "1"
    assert describe(1e-5) == "1e-05"
    assert describe(partial(cosine, start=1.0, end=0.0)) == "cosine(start=1.0, end=0.0)"
    assert describe(math.sqrt) == "sqrt"
    assert describe(Steps()) == "Steps()"
