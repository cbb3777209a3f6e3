"""Divergences between the two next-token distributions, from logits.

All are computed in log-space in fp32 (float64 stays float64), are true divergences (0 where the
distributions are equal, never negative beyond rounding) and stay finite for logits that are -inf on
tokens both models forbid. Where one model alone forbids a token, the infinite ones (`forward_kl` if
it is the student, `reverse_kl` if it is the teacher) read about 1e30 times the mass there, so that
it shows; `jsd` is at most log 2 anyway. Temperature is applied before, by `llm_distill.Logits`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["forward_kl", "jsd", "reverse_kl"]

FLOOR = -1e30
"""Stands for a logit of -inf: 0 * -1e30 is 0, but 0 * -inf is NaN."""


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mass-covering: `[N, V], [N, V] -> [N]`, nats.

    Formula: `sum_v p_v (log p_v - log q_v)` with p the teacher's and q the student's softmax.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (there as a cross-entropy; this
    subtracts the teacher's entropy, so that equal models read 0).

    >>> forward_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))  # half of log(4/3)
    tensor([0.1438])
    """
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return _kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), mode-seeking: `[N, V], [N, V] -> [N]`, nats.

    Formula: `sum_v q_v (log q_v - log p_v)`.

    Source: Gu, Dong, Wei, Huang 2023 (MiniLLM), arXiv 2306.08543, equation 1, here at each token.

    >>> reverse_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    tensor([0.1308])
    """
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return _kl(log_q, log_p)


def jsd(student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence: `[N, V], [N, V] -> [N]`, nats.

    Formula: `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`. Near the
    ends the value falls like beta times the forward KL (beta -> 0) or 1 - beta times the reverse KL
    (beta -> 1).

    Args:
        student: Logits.
        teacher: Logits.
        beta: Share of the teacher in the mixture, a fraction inside (0, 1).

    Raises:
        ValueError: If beta is outside (0, 1); the ends are `forward_kl` and `reverse_kl`.

    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1.

    >>> jsd(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    tensor([0.0338])
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"jsd: beta={beta} is outside (0, 1); for the ends write forward_kl (beta -> 0) or "
            "reverse_kl (beta -> 1)"
        )
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in fp32 or better, -inf logits replaced by a floor: `[N, V] -> [N, V]`."""
    return F.log_softmax(wide(logits).clamp_min(FLOOR), dim=-1)


def wide(values: Tensor) -> Tensor:
    """In fp32, or float64 where it was: losses are not computed in less."""
    return values if values.dtype == torch.float64 else values.float()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities: `[N, V], [N, V] -> [N]`."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
