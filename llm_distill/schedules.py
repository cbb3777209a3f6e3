"""Weights that change over training: functions of the progress in [0, 1].

A schedule is any pure function of the progress; with arguments it is a `functools.partial`, in a
recipe
`weight: {linear: {start: 1.0, end: 0.0}}`.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

__all__ = ["constant", "cosine", "linear", "step"]

Schedule = Callable[[float], float]
"""Training progress, a fraction in [0, 1] -> weight >= 0."""


def constant(progress: float, *, value: float) -> float:
    """The same weight throughout.

    >>> constant(0.3, value=0.5)
    0.5
    """
    return value


def linear(progress: float, *, start: float, end: float, until: float = 1.0) -> float:
    """A straight line from `start` to `end`, reached at the progress `until` and kept from there.

    >>> linear(0.25, start=1.0, end=0.0), linear(0.25, start=1.0, end=0.0, until=0.5)
    (0.75, 0.5)
    """
    return start + (end - start) * _share(progress, until)


def cosine(progress: float, *, start: float, end: float, until: float = 1.0) -> float:
    """Half a cosine wave from `start` to `end`, flat at both ends, reached at the progress `until`.

    >>> cosine(0.5, start=1.0, end=0.0), cosine(1.0, start=1.0, end=0.0)
    (0.5, 0.0)
    """
    share = 0.5 * (1.0 - math.cos(math.pi * _share(progress, until)))
    return start + (end - start) * share


def step(progress: float, *, before: float, after: float, at: float) -> float:
    """One weight before the progress `at` and another from there on: two stages, hint then logits.

    Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, section 2.3 (there one after the other).

    >>> [step(p, before=1.0, after=0.0, at=0.3) for p in (0.0, 0.29, 0.3, 1.0)]
    [1.0, 1.0, 0.0, 0.0]
    """
    if not 0 < at < 1:
        raise ValueError(f"at is {at}; write a share of the training between 0 and 1, such as 0.3")
    return before if progress < at else after


def _share(progress: float, until: float) -> float:
    """How far the progress is on its way to `until`, at most 1."""
    if not until > 0:
        raise ValueError(f"until is {until}; write a share of the training > 0, such as 0.5")
    return min(progress / until, 1.0)


def at(weight: float | Schedule, progress: float) -> float:
    """The weight at this progress, whether it is a number or a schedule.

    >>> at(0.5, 0.9), at(partial(linear, start=0.0, end=2.0), 0.5)
    (0.5, 1.0)
    """
    return float(weight(progress)) if callable(weight) else float(weight)


def check(weight: float | Schedule, owner: str) -> None:
    """Refuse a weight that is negative or not finite anywhere in training.

    Raises:
        ValueError: Naming `owner`, the weight and the progress where it fails.
    """
    for step in range(101):
        try:
            value = at(weight, step / 100)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{owner}: weight {_shown(weight)} gives no number at progress {step / 100} "
                f"({error}); write a number >= 0 or a schedule such as "
                "{linear: {start: 1.0, end: 0.0}}"
            ) from error
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"{owner}: weight is {value} at progress {step / 100}; it must be finite and >= 0"
            )


def _shown(weight: object) -> str:
    """A weight that may be none, for messages."""
    return describe(weight) if callable(weight) else repr(weight)


def describe(weight: float | Schedule) -> str:
    """The weight in a few words, for tables.

    >>> describe(0.5), describe(partial(linear, start=1.0, end=0.0))
    ('0.5', 'linear(start=1.0, end=0.0)')
    """
    if isinstance(weight, partial):
        arguments = ", ".join(f"{key}={value}" for key, value in weight.keywords.items())
        return f"{weight.func.__name__}({arguments})"
    if not callable(weight):
        return f"{float(weight):g}"
    return weight.__name__ if inspect.isroutine(weight) else repr(weight)
