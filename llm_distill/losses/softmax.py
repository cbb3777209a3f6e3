"""Log-probabilities, and the one sum that most divergences are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = -1e30
"""Stands for a logit of -inf: 0 * -1e30 is 0, but 0 * -inf is NaN."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in fp32 or better, -inf logits replaced by a floor: `[N, V] -> [N, V]`.

    >>> log_softmax(torch.tensor([[0.0, 0.0, -torch.inf]]))[0, :2]
    tensor([-0.6931, -0.6931])
    """
    return F.log_softmax(wide(logits).clamp_min(FLOOR), dim=-1)


def wide(values: Tensor) -> Tensor:
    """In fp32, or float64 where it was: losses are not computed in less."""
    return values if values.dtype == torch.float64 else values.float()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities: `[N, V], [N, V] -> [N]`, nats.

    >>> kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438])
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
