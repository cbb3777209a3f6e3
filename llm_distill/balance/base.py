"""What a balance is, the one that changes nothing, and running means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llm_distill.errors import InputError
from llm_distill.objectives import Term


class Balance(nn.Module):
    """Factors on the weights of K terms; this one leaves them as they are.

    Attributes:
        moves: Whether the factors change, and the log shall tell the weights.
        hears: Whether `after_step` shall be told of every step.
        layer: Of the student, where `measured` wants the gradient of each term; None: nowhere.
    """

    moves = False
    hears = False
    layer: int | None = None

    def asks(self, done: int) -> bool:
        """Whether the terms shall be measured on the next step, before it is taken.

        Args:
            done: Steps that were taken, those in which blocks learn alone left out.
        """
        del done
        return False

    def measured(self, values: Tensor, squares: Tensor) -> None:
        """Hear of the step that is about to be taken, over its micro-batches and all ranks.

        Args:
            values: `[K]`, mean of each term; NaN without items.
            squares: `[K]`, squared norm of the gradient of that mean at `layer`; NaN without items.
        """
        del values, squares

    def after_step(self, values: Tensor) -> None:
        """Hear of a finished step.

        Args:
            values: `[K]`, mean of each term over all ranks; NaN without items.
        """
        del values

    def factors(self, weights: Tensor) -> Tensor:
        """What each weight is multiplied by in the next step: `[K] -> [K]`, without waiting."""
        return torch.ones_like(weights)

    def describe(self) -> str:
        """In a few words, for tables; nothing for weights that stay."""
        return ""


BalanceRule = Callable[[Mapping[str, Term], int], Balance]
"""(terms under their names in the log, depth of the student) -> their balance."""


def fixed(terms: Mapping[str, Term], depth: int) -> Balance:
    """The weights as they were written."""
    del terms, depth
    return Balance()


def settle(rule: BalanceRule | None, terms: Mapping[str, Term], depth: int) -> Balance:
    """The balance that was asked for; None keeps the weights.

    Raises:
        InputError: If it does not fit the terms.
    """
    try:
        return (rule or fixed)(terms, depth)
    except ValueError as error:
        raise InputError(f"balance: {error}") from error


class RunningMean(nn.Module):
    """Running means of K numbers, bias corrected; what is no finite number is no news.

    Args:
        count: K.
        momentum: A fraction below 1.
    """

    def __init__(self, count: int, momentum: float) -> None:
        super().__init__()
        self.total: Tensor
        self.share: Tensor
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(count))
        self.register_buffer("share", torch.zeros(count))

    def add(self, values: Tensor) -> None:
        """One more of each: `[K]`."""
        known = values.isfinite()
        for mean, news in ((self.total, values), (self.share, torch.ones_like(values))):
            moved = self.momentum * mean + (1.0 - self.momentum) * news.to(mean.dtype)
            mean.copy_(torch.where(known, moved, mean))

    @property
    def mean(self) -> Tensor:
        """`[K]`; NaN before the first."""
        return self.total / self.share
