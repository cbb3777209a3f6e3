"""How functions are shown to people."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable


def describe_function(function: Callable[..., object]) -> str:
    """A function with its settings, as a recipe would write it.

    >>> import torch
    >>> from functools import partial
    >>> describe_function(partial(torch.add, alpha=2))
    'add(alpha=2)'
    """
    inner = getattr(function, "func", function)
    keywords = getattr(function, "keywords", {})
    arguments = ", ".join(f"{key}={_said(value)}" for key, value in keywords.items())
    name = getattr(inner, "__name__", type(inner).__name__)
    return f"{name}({arguments})" if arguments else str(name)


def _said(value: object) -> str:
    """A setting, functions among them by their names."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_said(entry) for entry in value)}]"
    function = inspect.isroutine(value) or isinstance(value, partial)
    return describe_function(cast("Callable[..., object]", value)) if function else str(value)
