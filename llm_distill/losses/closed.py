"""Divergences in closed form: value and gradient from one look at a block, without autograd.

For a row-wise loss l(q, p) with q = softmax(z), writing a = q dl/dq,

    dl/dz = a - q sum(a).

So a divergence gives its value and a, which stays finite where q tends to 0 (dl/dq does not);
multiples of q drop out of a. The divergences themselves, to be read and differentiated by autograd,
are in `divergences` and `reweighted`; `CLOSED` says which of them have a form here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from llm_distill.losses import divergences, reweighted
from llm_distill.losses.pairs import Pair

TINY = 1e-37
"""Probabilities below count as this: their logarithms would be -inf, or take ten times as long."""

LEAST = 0.05
"""Exponents and shares nearer to their limits than this are left to autograd."""


class Slope(NamedTuple):
    """What a closed form finds: value `[n]`, and a = `factor` x `a` with `total` = sum(a) `[n]`."""

    value: Tensor
    a: Tensor
    factor: float
    total: Tensor | float


Form = Callable[[Pair], Slope]


def forward_kl(x: Pair) -> Slope:
    """With a = -p."""
    return Slope(vecdot(x.p, x.gap), x.p, -1.0, -1.0)


def reverse_kl(x: Pair) -> Slope:
    """With a = q (log q - log p)."""
    a = torch.mul(x.q, x.gap, out=x.buffer("a"))
    value = -a.sum(-1)
    return Slope(value, a, -1.0, value)


def jsd(x: Pair, *, beta: float = 0.5, normalize_ends: bool = False) -> Slope:
    """With a = (1 - beta) q log(q / m) with m = beta p + (1 - beta) q."""
    if normalize_ends and beta in (0.0, 1.0):
        return reverse_kl(x) if beta else forward_kl(x)
    unit = 1.0 / (beta * (1.0 - beta)) if normalize_ends else 1.0
    log_m = torch.lerp(x.q, x.p, beta, out=x.buffer("m")).clamp_min_(TINY).log_()
    of_p = vecdot(x.p, x.log_p_over(log_m))
    a = x.log_q_over(log_m).mul_(x.q)
    of_q = a.sum(-1).mul_(1.0 - beta)
    return Slope((beta * of_p + of_q) * unit, a, (1.0 - beta) * unit, of_q * unit)


def skew_forward_kl(x: Pair, *, alpha: float = 0.1) -> Slope:
    """With a = -(1 - alpha) p q / m with m = alpha p + (1 - alpha) q."""
    m = torch.lerp(x.q, x.p, alpha, out=x.buffer("m")).clamp_min_(TINY)
    value = vecdot(x.p, x.log_p_over(torch.log(m, out=x.buffer("log m"))))
    a = torch.div(x.q, m, out=m).mul_(x.p)
    return Slope(value, a, alpha - 1.0, a.sum(-1).mul_(alpha - 1.0))


def skew_reverse_kl(x: Pair, *, alpha: float = 0.1) -> Slope:
    """With a = q (log(q / m) - alpha q / m) with m = (1 - alpha) p + alpha q."""
    m = torch.lerp(x.p, x.q, alpha, out=x.buffer("m")).clamp_min_(TINY)
    a = x.log_q_over(torch.log(m, out=x.buffer("log m")))
    value = vecdot(x.q, a)
    a.add_(torch.div(x.q, m, out=m), alpha=-alpha).mul_(x.q)
    return Slope(value, a, 1.0, a.sum(-1))


def tvd(x: Pair) -> Slope:
    """With a = q sign(q - p) / 2."""
    a = torch.sub(x.q, x.p, out=x.buffer("a"))
    value = torch.linalg.vector_norm(a, 1, -1).mul_(0.5)
    a.sign_().mul_(x.q)
    return Slope(value, a, 0.5, a.sum(-1).mul_(0.5))


def todi(x: Pair) -> Slope:
    """With a = -s p + (1 - s) q (1 - log p / q) with s = sigmoid(log p / q), held constant."""
    s = torch.sigmoid(x.gap, out=x.buffer("m"))
    toward_q = torch.sub(x.q, torch.mul(s, x.q, out=x.buffer("a")), out=x.buffer("a"))
    toward_p = s.mul_(x.p)
    value = vecdot(x.gap, toward_p)
    reverse = torch.mul(toward_q, x.gap, out=x.buffer("reverse"))
    value -= reverse.sum(-1)
    a = toward_q.sub_(toward_p).sub_(reverse)
    return Slope(value, a, 1.0, a.sum(-1))


def adaptive_kl(x: Pair, *, mu: float = 0.5) -> Slope:
    """With a = -w p - (1 - w) q log(p / q), w held constant."""
    w = reweighted.adaptive_weight(x.q, x.p, mu)
    a = torch.mul(x.q, x.gap, out=x.buffer("a"))
    reverse = -a.sum(-1)
    value = w * vecdot(x.p, x.gap) + (1.0 - w) * reverse
    a.mul_((1.0 - w)[:, None]).addcmul_(x.p, w[:, None])
    return Slope(value, a, -1.0, (1.0 - w) * reverse - w)


def alpha_beta(x: Pair, *, alpha: float = 0.2, beta: float = 0.7) -> Slope:
    """With a = q^beta (q^alpha - p^alpha) / alpha, for positive alpha and beta."""
    total = alpha + beta
    p_alpha = _power(x.log_p, alpha, x.buffer("m"))
    p_total = vecdot(p_alpha, _power(x.log_p, beta, x.buffer("a")))
    q_alpha, q_beta = _power(x.log_q, alpha, x.buffer("a")), _power(x.log_q, beta, x.buffer("b"))
    q_total = vecdot(q_alpha, q_beta)
    a = q_alpha.sub_(p_alpha).mul_(q_beta)
    sum_a = a.sum(-1)
    value = (sum_a + (p_total - q_total) * (alpha / total)) / (alpha * beta)
    return Slope(value, a, 1.0 / alpha, sum_a / alpha)


def _power(logs: Tensor, exponent: float, out: Tensor) -> Tensor:
    """exp(exponent logs); exp2 takes half the time of exp."""
    return torch.mul(logs, exponent / math.log(2.0), out=out).exp2_()


CLOSED: dict[Callable[..., Tensor], Callable[..., Slope]] = {
    divergences.forward_kl: forward_kl,
    divergences.reverse_kl: reverse_kl,
    divergences.jsd: jsd,
    divergences.skew_forward_kl: skew_forward_kl,
    divergences.skew_reverse_kl: skew_reverse_kl,
    divergences.tvd: tvd,
    reweighted.adaptive_kl: adaptive_kl,
    reweighted.alpha_beta: alpha_beta,
    reweighted.todi: todi,
}


def closed_form(loss: Callable[..., Tensor]) -> Form | None:
    """The closed form of a divergence with its settings; None where there is none.

    Raises:
        ValueError: For settings that the divergence refuses.
    """
    bound = loss if isinstance(loss, partial) else partial(loss)
    form = CLOSED.get(bound.func) if isinstance(bound.func, Hashable) else None
    if form is None or bound.args:
        return None
    loss(torch.zeros(1, 2), torch.zeros(1, 2))  # which refuses impossible settings
    settings = bound.keywords
    if form is alpha_beta and min({"alpha": 0.2, "beta": 0.7, **settings}.values()) < LEAST:
        limits = {(1.0, 0.0): forward_kl, (0.0, 1.0): reverse_kl}
        return limits.get((settings.get("alpha", 0.2), settings.get("beta", 0.7)))
    if form is jsd and settings.get("normalize_ends"):
        beta = settings.get("beta", 0.5)
        # Divided by little, the rounding of the form here would show.
        if 0.0 < min(beta, 1.0 - beta) < LEAST:
            return None
    return partial(form, **settings) if settings else form
