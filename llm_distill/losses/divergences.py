"""Divergences between the two next-token distributions, from logits.

All are computed in log-space in fp32 (float64 stays float64), are true divergences (0 where the
distributions are equal, never negative beyond rounding) and stay finite for logits that are -inf on
tokens both models forbid. Where one model alone forbids a token, the infinite ones (`forward_kl` if
it is the student, `reverse_kl` if it is the teacher) read about 1e30 times the mass there, so that
it shows; mixtures and `tvd` are bounded. Temperature is applied before, by `llm_distill.Logits`.

In formulas p is the teacher's softmax and q the student's.
"""

import math

import torch
from torch import Tensor

from llm_distill.losses.softmax import FLOOR, kl, log_softmax, wide

__all__ = [
    "FLOOR",
    "forward_kl",
    "jsd",
    "log_softmax",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "wide",
]

WIDEST_GAP = 80.0
"""Beyond this log-ratio, still finite under exp in fp32, a token has no mass to be weighed with."""


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mass-covering: `[N, V], [N, V] -> [N]`, nats.

    Formula: `sum_v p_v (log p_v - log q_v)`.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (there as a cross-entropy; this
    subtracts the teacher's entropy, so that equal models read 0).

    >>> forward_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))  # half of log(4/3)
    tensor([0.1438])
    """
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), mode-seeking: `[N, V], [N, V] -> [N]`, nats.

    Formula: `sum_v q_v (log q_v - log p_v)`.

    Source: Gu, Dong, Wei, Huang 2023 (MiniLLM), arXiv 2306.08543, equation 1, here at each token.

    >>> reverse_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    tensor([0.1308])
    """
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return kl(log_q, log_p)


def jsd(
    student: Tensor, teacher: Tensor, *, beta: float = 0.5, normalize_ends: bool = False
) -> Tensor:
    """Generalised Jensen-Shannon divergence: `[N, V], [N, V] -> [N]`, nats.

    Formula: `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`. Near the
    ends the value falls like beta times the forward KL (beta -> 0) or 1 - beta times the reverse KL
    (beta -> 1); `normalize_ends` takes that factor out.

    Args:
        student: Logits.
        teacher: Logits.
        beta: Share of the teacher in the mixture, a fraction inside (0, 1).
        normalize_ends: Divide by beta (1 - beta). The value then goes from the forward KL at beta 0
            to the reverse KL at beta 1, and both ends may be asked for; at 1/2 it is 4 times the
            plain one.

    Raises:
        ValueError: If beta is outside (0, 1), or outside [0, 1] with `normalize_ends`.

    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1 (`normalize_ends` is ours).

    >>> jsd(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    tensor([0.0338])
    >>> jsd(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2), beta=0.0, normalize_ends=True)
    tensor([0.1438])
    """
    if normalize_ends and beta in (0.0, 1.0):
        return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
    check_inside(
        f"jsd: beta={beta}",
        beta,
        "for the ends write forward_kl (beta -> 0) or reverse_kl (beta -> 1), or "
        "normalize_ends=True, which takes 0 and 1 as well",
    )
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    of_p, of_q = beta, 1.0 - beta
    if normalize_ends:
        of_p, of_q = 1.0 / of_q, 1.0 / of_p
    return of_p * _kl_to_mixture(log_p, log_q, beta, 1.0 - beta) + of_q * _kl_to_mixture(
        log_q, log_p, 1.0 - beta, beta
    )


def skew_forward_kl(student: Tensor, teacher: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student): `[N, V], [N, V] -> [N]`, nats.

    At most -log alpha, and its gradient stays bounded where the student has no mass.

    Args:
        student: Logits.
        teacher: Logits.
        alpha: Share of the teacher in the mixture, a fraction inside (0, 1).

    Raises:
        ValueError: If alpha is outside (0, 1).

    Source: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv 2402.03898 (skew KL, alpha 0.1).

    >>> skew_forward_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2), alpha=0.5)
    tensor([0.0323])
    """
    check_inside(
        f"skew_forward_kl: alpha={alpha}",
        alpha,
        "for alpha -> 0 write forward_kl; at alpha 1 the value is always 0",
    )
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return _kl_to_mixture(log_p, log_q, alpha, 1.0 - alpha)


def skew_reverse_kl(student: Tensor, teacher: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(student || (1 - alpha) teacher + alpha student): `[N, V], [N, V] -> [N]`, nats.

    At most -log alpha. The student in the mixture is differentiated as well, so that the gradient
    is that of the value; the code of DistiLLM-2 (arXiv 2503.07067) detaches it.

    Args:
        student: Logits.
        teacher: Logits.
        alpha: Share of the student in the mixture, a fraction inside (0, 1).

    Raises:
        ValueError: If alpha is outside (0, 1).

    Source: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv 2402.03898 (skew reverse KL, alpha 0.1).

    >>> skew_reverse_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2), alpha=0.5)
    tensor([0.0354])
    """
    check_inside(
        f"skew_reverse_kl: alpha={alpha}",
        alpha,
        "for alpha -> 0 write reverse_kl; at alpha 1 the value is always 0",
    )
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return _kl_to_mixture(log_q, log_p, alpha, 1.0 - alpha)


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """Total variation distance, in [0, 1]: `[N, V], [N, V] -> [N]`.

    Formula: `1/2 sum_v |p_v - q_v|`. The gradient has a sign per token, which flips where p = q: in
    low precision it is the least exact of all.

    Source: Wen, Li, Du, Mou 2023 (f-distill), arXiv 2307.15190, here over the whole vocabulary at
    each token.

    >>> tvd(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    tensor([0.2500])
    """
    return 0.5 * (log_softmax(teacher).exp() - log_softmax(student).exp()).abs().sum(-1)


def check_inside(given: str, value: float, instead: str) -> None:
    """Refuse a fraction at the ends or outside.

    Args:
        given: Function, name and value, as the message shall say it.
        value: The fraction.
        instead: What to write at the ends.

    Raises:
        ValueError: If the value is outside (0, 1), or NaN.
    """
    if not 0.0 < value < 1.0:
        raise ValueError(f"{given} is outside (0, 1); {instead}")


def _kl_to_mixture(log_p: Tensor, log_q: Tensor, own: float, other: float) -> Tensor:
    """KL(p || own p + other q) from log-probabilities: `[N, V], [N, V] -> [N]`.

    The log-ratio of the mixture to p is log(own + other e^gap) with gap = log q - log p.
    """
    gap = log_q - log_p
    if other <= 0.5:
        # Exact relative to a small `other` too, by which `jsd` may divide afterwards.
        log_ratio = torch.log1p(other * torch.expm1(gap.clamp_max(WIDEST_GAP)))
    else:
        # A tensor made on the device: a Python number would have to be sent there.
        rest = torch.full((), math.log(own), dtype=gap.dtype, device=gap.device)
        log_ratio = torch.logaddexp(gap + math.log(other), rest)
    return -(log_p.exp() * log_ratio).sum(-1)
