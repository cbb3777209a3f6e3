"""Divergences that weigh the two directions, or the tokens, anew.

The conventions of `divergences` hold: logits in, one value per row, log-space in fp32 or better, p
the teacher's softmax and q the student's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.divergences import check_inside
from llm_distill.losses.softmax import FLOOR, kl, log_softmax

__all__ = ["adaptive_kl", "alpha_beta", "decoupled", "todi"]

NARROW = 64
"""Tokens among which the head of the teacher is looked for first, on the CPU."""

GROUP = 32
"""Tokens of which only the largest is looked at first, to find the largest of all."""

HIGHEST = 60.0
"""Powers of a probability beyond e^60, about 1e26, count as infinite."""

FARTHEST = 1e12
"""Log-ratios stop here where they are squared, which would overflow."""

NEAR_ZERO = 1e-20
"""Exponents below this are the limit 0: their products with log-ratios would underflow."""


def adaptive_kl(student: Tensor, teacher: Tensor, *, mu: float = 0.5) -> Tensor:
    """Forward and reverse KL mixed by where the models differ: `[N, V], [N, V] -> [N]`, nats.

    Formula: `w KL(p || q) + (1 - w) KL(q || p)`, w the share of the teacher's head in
    `sum_v |p_v - q_v|` (`adaptive_weight`). No gradient goes through w.

    Args:
        student: Logits.
        teacher: Logits.
        mu: Mass of the head, a fraction inside (0, 1).

    Raises:
        ValueError: If mu is outside (0, 1).

    Source: Wu et al. 2024 (AKL), arXiv 2404.02657. Where the models are equal, 0/0 there, w is 1/2.

    >>> adaptive_kl(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))  # w = 1/2
    tensor([0.1373])
    """
    check_inside(
        f"adaptive_kl: mu={mu}",
        mu,
        "it is the teacher's mass that counts as its head, 0.5 in the paper",
    )
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    weight = adaptive_weight(log_q.exp(), log_p.exp(), mu)
    return weight * kl(log_p, log_q) + (1.0 - weight) * kl(log_q, log_p)


def adaptive_weight(q: Tensor, p: Tensor, mu: float) -> Tensor:
    """Share of the head in the sum of |p - q|, detached: `[N, V], [N, V] -> [N]`, in [0, 1].

    The head is the smallest set of tokens on which p has at least the mass mu; which of several
    equal tokens completes it is left open. Equal models have 1/2.

    Args:
        q: The student's probabilities.
        p: The teacher's.
        mu: Mass of the head, a fraction.

    >>> p = torch.tensor([[0.1, 0.6, 0.3]])
    >>> adaptive_weight(torch.tensor([[0.2, 0.3, 0.5]]), p, 0.5)  # 0.3 of 0.1 + 0.3 + 0.2
    tensor([0.5000])
    >>> adaptive_weight(p, p, 0.5)
    tensor([0.5000])
    """
    q, p = q.detach(), p.detach()
    gap = (p - q).abs_()
    # On a GPU one sort is cheaper than asking which rows need more.
    head = _head_sum(gap, p, mu, NARROW if p.device.type == "cpu" else p.shape[-1])
    total = gap.sum(-1)
    known = total > 0
    return torch.where(known, head / total.where(known, 1.0), 0.5).clamp_max(1.0)


def alpha_beta(
    student: Tensor, teacher: Tensor, *, alpha: float = 0.2, beta: float = 0.7
) -> Tensor:
    """Alpha-beta divergence, all its limits included: `[N, V], [N, V] -> [N]`.

    Formula: `-1/(a b) sum_v [p^a q^b - a/(a + b) p^(a + b) - b/(a + b) q^(a + b)]`. Where a factor
    is 0 the value is the limit:

    - b = 0: `1/a^2 sum_v [p^a log(p^a / q^a) - p^a + q^a]`; (1, 0) is `forward_kl`;
    - a = 0: the same with p and q, a and b swapped; (0, 1) is `reverse_kl`;
    - a + b = 0: `1/a^2 sum_v [log(q^a / p^a) + (p / q)^a - 1]`;
    - both 0: `1/2 sum_v (log p - log q)^2`.

    (1/2, 1/2) is `2 sum_v (sqrt p - sqrt q)^2`. At the same ratio p / q a token counts for
    p^(a + b). With a = 0, b = 0 or a negative one the value can be infinite, and reads more than
    1e20 then.

    Args:
        student: Logits.
        teacher: Logits.
        alpha: Exponent of the teacher, a finite number.
        beta: Exponent of the student, a finite number.

    Raises:
        ValueError: If alpha or beta is not finite.

    Source: Wang et al. 2025 (ABKD), arXiv 2505.04560, alpha 0.2 and beta 0.7 for GPT-2. The limits
    are those of the formula; the paper's code has 1/a for 1/a^2.

    >>> both = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    >>> alpha_beta(*both), alpha_beta(*both, alpha=1.0, beta=0.0)
    (tensor([0.1446]), tensor([0.1438]))
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(
            f"alpha_beta: alpha={alpha}, beta={beta}; both must be finite numbers: write alpha=1, "
            "beta=0 for the forward KL, alpha=0, beta=1 for the reverse KL"
        )
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    if abs(beta) > abs(alpha):
        alpha, beta, log_q, log_p = beta, alpha, log_p, log_q
    # Now alpha is the larger one: nothing is divided by the smaller, which may be 0.
    gap = log_q - log_p
    if abs(alpha) < torch.finfo(gap.dtype).eps ** 0.5:
        return 0.5 * gap.clamp(-FARTHEST, FARTHEST).square().sum(-1)
    total = alpha + beta
    of_p, of_q, of_both = total * log_p, total * log_q, alpha * log_p + beta * log_q
    values = _growth(of_p, of_q, gap, total) - _growth(of_p, of_both, gap, beta)
    beyond = torch.maximum(torch.maximum(of_p, of_q), of_both) >= HIGHEST
    return torch.where(beyond, -FLOOR * gap.ne(0), values / alpha).sum(-1)


def todi(student: Tensor, teacher: Tensor) -> Tensor:
    """Token-wise mix of both KLs: `[N, V], [N, V] -> [N]`, nats.

    Formula: `sum_v [s_v p_v log(p_v / q_v) + (1 - s_v) q_v log(q_v / p_v)]` with `s_v =
    sigmoid(log(p_v / q_v))`, through which no gradient goes. So a token the student underrates is
    taught by the forward KL and one it overrates by the reverse. As s = p / (p + q), the value
    equals KL(p || q) + KL(q || p); the gradient is another.

    Source: Jung, Yoon, Kim, Lee 2025 (ToDi), arXiv 2505.16297.

    >>> todi(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    tensor([0.2747])
    """
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    gap = log_p - log_q
    share = torch.sigmoid(gap.detach())
    return (gap * (share * log_p.exp() - (1.0 - share) * log_q.exp())).sum(-1)


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Decoupled KD, label against rest and within the rest: `[N, V] x2, [N] -> [N]`, nats.

    Formula: `alpha KL(b_p || b_q) + beta KL(r_p || r_q)`, b = (probability of the label, of all
    other tokens), r = the distribution of the other tokens among themselves. With beta = 1 - p of
    the label, row by row, and alpha = 1 this is the forward KL; so beta = 1 already raises the
    second part where the teacher is sure.

    Args:
        student: Logits.
        teacher: Logits.
        labels: The token that came next, of the vocabulary of the logits.
        alpha: Factor of the first part, >= 0.
        beta: Factor of the second part, >= 0. Images in the paper's code: 8 (CIFAR-100), 0.5
            (ImageNet); here 1.

    Raises:
        ValueError: If alpha or beta is negative or not finite, or both are 0.

    Source: Zhao et al. 2022 (DKD), arXiv 2203.08679.

    >>> student = torch.tensor([[0.0, math.log(3.0), 0.0]])
    >>> decoupled(student, torch.zeros(1, 3), torch.tensor([1]))  # the other two: equal
    tensor([0.1446])
    """
    if not (0.0 <= alpha < math.inf and 0.0 <= beta < math.inf and alpha + beta > 0.0):
        raise ValueError(
            f"decoupled: alpha={alpha}, beta={beta}; both must be finite, >= 0 and not both 0; "
            "alpha=1, beta=1 weighs target and rest alike"
        )
    target_q, rest_q = _split(student, labels)
    target_p, rest_p = _split(teacher, labels)
    return alpha * kl(target_p, target_q) + beta * kl(rest_p, rest_q)


def _head_sum(values: Tensor, p: Tensor, mu: float, width: int) -> Tensor:
    """Sum of values over the head of p, looked for in its `width` largest: `[N, V] x2 -> [N]`."""
    vocabulary = p.shape[-1]
    # From some width on it is faster to sort.
    whole = GROUP * width >= vocabulary
    largest, ids = p.sort(-1, descending=True) if whole else _largest(p, width)
    mass = largest.cumsum(-1)
    # A token belongs to the head if those before it have not reached mu.
    inside = F.pad(mass[:, :-1], (1, 0)) < mu
    sums = (values.gather(-1, ids) * inside).sum(-1)
    if not whole:
        short = (mass[:, -1] < mu).nonzero().squeeze(-1)
        if len(short):
            sums[short] = _head_sum(values[short], p[short], mu, 8 * width)
    return sums


def _largest(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `topk` gives, in a third of the time: `[N, V] -> [N, k], [N, k]` in descending order.

    The k largest numbers lie in the k groups with the largest maxima, or in no group.
    """
    groups = p.shape[-1] // GROUP
    grouped = groups * GROUP
    maxima = p[:, :grouped].unflatten(-1, (GROUP, groups)).amax(1)
    leading = maxima.topk(k, sorted=False).indices.unsqueeze(1)
    ids = (leading + torch.arange(0, grouped, groups, device=p.device).unsqueeze(-1)).flatten(1)
    rest = torch.arange(grouped, p.shape[-1], device=p.device)
    ids = torch.cat([ids, rest.expand(len(p), -1)], -1)
    largest, places = p.gather(-1, ids).topk(k)
    return largest, ids.gather(-1, places)


def _growth(low: Tensor, high: Tensor, gap: Tensor, rate: float) -> Tensor:
    """(e^high - e^low) / rate where high = low + rate gap; at rate 0 its limit e^low gap.

    The difference of close exponents is taken from `gap`, which knows it better.
    """
    low = low.clamp_max(HIGHEST).exp()
    if abs(rate) < NEAR_ZERO:
        return low * gap
    rise = rate * gap
    near = rise.abs() < 1.0
    far = high.clamp_max(HIGHEST).exp() - low
    return torch.where(near, low * torch.expm1(rise.where(near, 0.0)), far) / rate


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, any other token) and of each other token, given it is another.

    `[N, V], [N] -> [N, 2], [N, V]`. The mass of the others is summed, not taken from 1, which would
    leave nothing where the label is nearly sure.
    """
    log_probs, target = log_softmax(logits), labels.unsqueeze(-1)
    # Below the floor: where all others are forbidden, the label is still not one of them.
    others = log_probs.scatter(-1, target, 2.0 * FLOOR)
    rest = others.logsumexp(-1, keepdim=True).clamp_min(FLOOR)
    return torch.cat([log_probs.gather(-1, target), rest], -1), F.log_softmax(others, -1)
