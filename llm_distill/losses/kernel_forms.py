"""The divergences once more, as device functions: what each token adds to a row's value and slope.

As in `closed`: for a row-wise loss l(q, p) with q = softmax(z), writing a = q dl/dq, the gradient
is dl/dz = a - q sum(a). Each function takes log q, log p, q and p of a block of tokens and two
numbers of its own, and returns what the tokens add to the value, and a.

This module needs Triton, so nothing but `kernel_rows` imports it.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""`triton.jit`, which has no types."""

Terms = tuple[tl.tensor, tl.tensor]
"""What the tokens of a block add to the value, and a."""

HIGHEST_GAP = tl.constexpr(80.0)
"""Of log p - log q in a mixture: exp(80) is finite in fp32, and a q of exp(-80) adds nothing."""

HIGHEST_EXPONENT = tl.constexpr(55.0)
"""Exponents stop here, at about 1e24: beyond, a divergence is infinite for all that matters."""

NEAR_ZERO = tl.constexpr(1e-6)
"""Exponents of `alpha_beta` below this are the limit 0."""

ZERO = tl.constexpr(1e-30)
"""An exponent of 0: with it (e^(rate gap) - 1) / rate is its limit, the gap, to all digits."""


@jit
def forward_kl(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, first: float, second: float
) -> "Terms":
    """KL(p || q): a = -p, whose sum is -1."""
    return p * (log_p - log_q), -p


@jit
def reverse_kl(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, first: float, second: float
) -> "Terms":
    """KL(q || p): a = q (log q - log p)."""
    a = q * (log_q - log_p)
    return a, a


@jit
def jsd(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, beta: float, second: float
) -> "Terms":
    """Jensen-Shannon: a = (1 - beta) q log(q / m) with m = beta p + (1 - beta) q."""
    gap = log_p - log_q
    a = (beta - 1.0) * q * _log_mixture(gap, 1.0 - beta, beta)
    return a - beta * p * _log_mixture(-gap, beta, 1.0 - beta), a


@jit
def skew_forward_kl(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, alpha: float, second: float
) -> "Terms":
    """KL(p || m): a = -(1 - alpha) p q / m with m = alpha p + (1 - alpha) q."""
    gap = log_p - log_q
    a = (alpha - 1.0) * p / (1.0 - alpha + alpha * _odds(gap))
    return -p * _log_mixture(-gap, alpha, 1.0 - alpha), a


@jit
def skew_reverse_kl(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, alpha: float, second: float
) -> "Terms":
    """KL(q || m): a = q (log(q / m) - alpha q / m) with m = (1 - alpha) p + alpha q."""
    gap = log_p - log_q
    value = -q * _log_mixture(gap, alpha, 1.0 - alpha)
    return value, value - alpha * q / (alpha + (1.0 - alpha) * _odds(gap))


@jit
def tvd(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, first: float, second: float
) -> "Terms":
    """Half the L1 distance: a = q sign(q - p) / 2."""
    gap = q - p  # NaN goes on into the value, which a comparison would turn into 0
    side = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
    return 0.5 * tl.abs(gap), side * q


@jit
def todi(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, first: float, second: float
) -> "Terms":
    """Both KLs, mixed by s = sigmoid(gap), held constant: a = -s p + (1 - s) q (1 - gap)."""
    gap = log_p - log_q
    small = tl.exp(-tl.abs(gap))  # sigmoid of either sign, from an exp that cannot overflow
    near, far = 1.0 / (1.0 + small), small / (1.0 + small)
    toward_p = tl.where(gap > 0.0, near, far) * p
    toward_q = tl.where(gap > 0.0, far, near) * q
    return gap * (toward_p - toward_q), toward_q * (1.0 - gap) - toward_p


@jit
def alpha_beta(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, alpha: float, beta: float
) -> "Terms":
    """Where |alpha| >= |beta|: a = q^beta (q^alpha - p^alpha) / alpha."""
    value = _alpha_beta_value(log_q, log_p, alpha, beta)
    return value, _alpha_beta_slope(log_q, log_p, alpha, beta)


@jit
def beta_alpha(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, alpha: float, beta: float
) -> "Terms":
    """The same where |alpha| < |beta|."""
    value = _alpha_beta_value(log_p, log_q, beta, alpha)
    return value, _alpha_beta_slope(log_q, log_p, alpha, beta)


@jit
def square(
    log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, first: float, second: float
) -> "Terms":
    """The same where both are 0, half the squared distance of the logs: a = log q - log p."""
    a = log_q - log_p
    return 0.5 * a * a, a


@jit
def _odds(gap: tl.tensor) -> tl.tensor:
    """e^gap, finite."""
    return tl.exp(tl.where(gap > HIGHEST_GAP, HIGHEST_GAP, gap))


@jit
def _log_mixture(gap: tl.tensor, own: float, other: float) -> tl.tensor:
    """log(own + other e^gap) of shares that add up to 1: of a mixture, relative to its first part.

    As log(1 + x), exact relative to a small share too; as it stands where 1 + x would lose digits.
    """
    x = other * _expm1(tl.where(gap > HIGHEST_GAP, HIGHEST_GAP, gap))
    deep = x < -0.5
    u = tl.where(deep, own + other * _odds(gap), 1.0 + x)
    rounded = u == 1.0
    # What is lost in 1 + x is lost alike in the quotient.
    exact = x / tl.where(rounded, 1.0, u - 1.0)
    log_u = tl.log(u)
    return tl.where(deep, log_u, tl.where(rounded, x, log_u * exact))


@jit
def _alpha_beta_value(log_q: tl.tensor, log_p: tl.tensor, alpha: float, beta: float) -> tl.tensor:
    """As in `reweighted.alpha_beta`: nothing is divided by the smaller exponent, which may be 0."""
    both = alpha + beta
    low = both * log_p
    whole = _growth(low, both * log_q, log_q - log_p, both)
    return (whole - _growth(low, alpha * log_p + beta * log_q, log_q - log_p, beta)) / alpha


@jit
def _alpha_beta_slope(log_q: tl.tensor, log_p: tl.tensor, alpha: float, beta: float) -> tl.tensor:
    low = alpha * log_p + beta * log_q
    return _growth(low, (alpha + beta) * log_q, log_q - log_p, alpha)


@jit
def _growth(low: tl.tensor, high: tl.tensor, gap: tl.tensor, rate: float) -> tl.tensor:
    """(e^high - e^low) / rate where high = low + rate gap; at rate 0 its limit e^low gap."""
    rate = tl.where(tl.abs(rate) < NEAR_ZERO, ZERO, rate)
    rise = rate * gap
    most = tl.where(low > high, low, high)
    most = tl.where(most > HIGHEST_EXPONENT, HIGHEST_EXPONENT, most)
    fall = tl.exp(most) * _expm1(-tl.abs(rise))
    return tl.where(rise > 0.0, -fall, fall) / rate


@jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """e^x - 1, exact near 0, where the difference is not: by its series, to 2e-7 at 1/2."""
    tail = 1.0 + x * (1.0 / 5 + x * (1.0 / 30 + x * (1.0 / 210)))
    near = x * (1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24) * tail)))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0)


FORMS: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "todi": todi,
    "alpha_beta": alpha_beta,
    "beta_alpha": beta_alpha,
    "square": square,
}
"""By the names that `kernels.Form` has for them."""
