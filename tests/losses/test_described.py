from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from llm_distill.losses import jsd
from llm_distill.losses.described import describe_function


class Mine:
    """A loss of a user's own."""

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student - teacher).sum(-1)


def mixed(student: torch.Tensor, teacher: torch.Tensor, *, of: list[Any]) -> torch.Tensor:
    """A loss made of others."""
    return torch.stack([loss(student, teacher) for loss in of]).sum(0)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (jsd, "jsd"),
        (partial(jsd, beta=0.1), "jsd(beta=0.1)"),
        (partial(mixed, of=[jsd, partial(jsd, beta=1)]), "mixed(of=[jsd, jsd(beta=1)])"),
        (Mine(), "Mine"),
    ],
)
def test_a_name_and_its_settings(function: Callable[..., Any], told: str) -> None:
    """Never an address in memory."""
    assert describe_function(function) == told
