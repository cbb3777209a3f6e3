"""Balance between terms: factors on their weights that follow how the training goes.

A balance is any function `(terms, depth) -> Balance`, where `depth` is the student's; with settings
it is a `functools.partial`, in a recipe `balance: {normalised: {momentum: 0.9}}`. Whatever moves is
a buffer of the `Balance`, lives on the device, and is saved in checkpoints and resumed. Evaluations
use the weights without it: their loss stays comparable.
"""

from llm_distill.balance.base import Balance, BalanceRule, RunningMean, fixed
from llm_distill.balance.gradients import gradient
from llm_distill.balance.values import normalised, uncertainty

__all__ = [
    "Balance",
    "BalanceRule",
    "RunningMean",
    "fixed",
    "gradient",
    "normalised",
    "uncertainty",
]
