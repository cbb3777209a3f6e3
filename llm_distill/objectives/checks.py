"""What settings of objectives are held against."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_distill.losses.described import describe_function

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def check_choice(what: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a word that is not in the list.

    Raises:
        ValueError: With the list.
    """
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; write one of {', '.join(allowed)}")


def check_evidence(rows: int, owner: str) -> None:
    """Refuse a calibration batch that says nothing.

    Raises:
        ValueError: If it has no rows.
    """
    if not rows:
        raise ValueError(
            f"{owner}: the first examples of the training data have no row to calibrate on; "
            "shuffle the data, or write rows: valid"
        )


def check_function(owner: str, field: str, value: object, home: str) -> None:
    """Refuse what cannot be called, a name among it: names are for recipes.

    Raises:
        ValueError: With what to write in Python.
    """
    if callable(value):
        return
    instead = f"{home}.{value}" if isinstance(value, str) else f"a function of {home}"
    raise ValueError(f"{owner}: {field} is {value!r}; in Python write {instead}")


def check_row_function(
    function: Callable[..., Any], shape: tuple[int, ...], owner: str, **given: Tensor
) -> None:
    """Refuse a loss that does not return one value per row, tried on two small tensors.

    Args:
        function: The loss.
        shape: Of both tensors.
        owner: Who asks, for messages.
        given: What it is called with besides.

    Raises:
        ValueError: Naming the loss and what it returned.
    """
    inner: object = function.func if isinstance(function, partial) else function
    if isinstance(inner, nn.Module) and any(p.requires_grad for p in inner.parameters()):
        raise ValueError(
            f"{owner}: loss {type(inner).__name__} has parameters, which nobody would train; write "
            "an Objective whose build returns a Term of its own, or freeze them"
        )
    sample = torch.linspace(0.1, 1.0, int(torch.tensor(shape).prod())).view(shape)
    sample = sample / sample.sum(-1, keepdim=True)
    name = describe_function(function)
    try:
        values = function(sample.clone().requires_grad_(), sample, **given)
    except Exception as error:
        raise ValueError(
            f"{owner}: loss {name} fails on two tensors of shape {list(shape)}: {error}"
        ) from error
    if not isinstance(values, Tensor) or values.shape != shape[:1]:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{owner}: loss {name} returned {got} for {shape[0]} rows; a loss returns one value "
            "per row and leaves the "
            "reduction to the caller (reduction='none', then a mean over the last dimension)"
        )
    if not values.requires_grad:
        raise ValueError(
            f"{owner}: loss {name} has no gradient for the student, so nothing would be trained; "
            "leave the student's tensor attached (no .detach(), argmax or .item())"
        )


def check_least(name: str, number: int | None, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ValueError: Naming the setting.
    """
    if number is not None and number < least:
        raise ValueError(f"{name} is {number}; write a number from {least} on")
