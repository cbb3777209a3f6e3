"""Every loss once more, as loops over Python floats in float64, to be read beside its paper.

No torch and nothing from the package: what is tested and what it is tested against share no code.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(logits: Array) -> list[float]:
    """Log-probabilities of one row; a logit of -inf has the log-probability -inf."""
    highest = max(logits)
    total = math.log(sum(math.exp(z - highest) for z in logits))
    return [float(z - highest - total) for z in logits]


def kl(log_p: list[float], log_q: list[float]) -> float:
    """KL(p || q) of one row: tokens without mass under p do not count."""
    value = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        if math.exp(a) > 0:
            value += math.exp(a) * (a - b)
    return value


def forward_kl(student: Array, teacher: Array) -> Array:
    """Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2, as a divergence: KL(p || q)."""
    rows = zip(student, teacher, strict=True)
    return np.array([kl(log_softmax(z_t), log_softmax(z_s)) for z_s, z_t in rows])


def reverse_kl(student: Array, teacher: Array) -> Array:
    """Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 1, at each token: KL(q || p)."""
    rows = zip(student, teacher, strict=True)
    return np.array([kl(log_softmax(z_s), log_softmax(z_t)) for z_s, z_t in rows])


def jsd(student: Array, teacher: Array, beta: float) -> Array:
    """Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1: P the teacher, Q the student."""
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        log_q, log_p = log_softmax(z_s), log_softmax(z_t)
        log_m = mixture(log_p, log_q, beta)
        values.append(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))
    return np.array(values)


def mixture(log_p: list[float], log_q: list[float], share: float) -> list[float]:
    """Log of share p + (1 - share) q."""
    mixed = [
        share * math.exp(a) + (1 - share) * math.exp(b) for a, b in zip(log_p, log_q, strict=True)
    ]
    return [math.log(m) if m > 0 else -math.inf for m in mixed]


def skew_forward_kl(student: Array, teacher: Array, alpha: float) -> Array:
    """Ko et al. 2024 (DistiLLM), arXiv 2402.03898: KL(p || alpha p + (1 - alpha) q)."""
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        log_q, log_p = log_softmax(z_s), log_softmax(z_t)
        values.append(kl(log_p, mixture(log_p, log_q, alpha)))
    return np.array(values)


def skew_reverse_kl(student: Array, teacher: Array, alpha: float) -> Array:
    """Ko et al. 2024 (DistiLLM), arXiv 2402.03898: KL(q || (1 - alpha) p + alpha q)."""
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        log_q, log_p = log_softmax(z_s), log_softmax(z_t)
        values.append(kl(log_q, mixture(log_q, log_p, alpha)))
    return np.array(values)


def tvd(student: Array, teacher: Array) -> Array:
    """Wen et al. 2023 (f-distill), arXiv 2307.15190: half the sum of |p - q|."""
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        pairs = zip(log_softmax(z_s), log_softmax(z_t), strict=True)
        values.append(sum(abs(math.exp(b) - math.exp(a)) for a, b in pairs) / 2)
    return np.array(values)


def head_share(z_s: Array, z_t: Array, mu: float) -> float:
    """Wu et al. 2024 (AKL), arXiv 2404.02657: the head's share in the sum of |p - q|."""
    q = [math.exp(a) for a in log_softmax(z_s)]
    p = [math.exp(a) for a in log_softmax(z_t)]
    mass, head, tail = 0.0, 0.0, 0.0
    for token in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass < mu:
            head += abs(p[token] - q[token])
        else:
            tail += abs(p[token] - q[token])
        mass += p[token]
    return head / (head + tail) if head + tail > 0 else 0.5


def adaptive_kl(student: Array, teacher: Array, mu: float, held: Array | None = None) -> Array:
    """Wu et al. 2024 (AKL), arXiv 2404.02657; the weights are those of the student `held`."""
    held = student if held is None else held
    weight = np.array([head_share(s, t, mu) for s, t in zip(held, teacher, strict=True)])
    return weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)


def todi(student: Array, teacher: Array, held: Array | None = None) -> Array:
    """Jung et al. 2025 (ToDi), arXiv 2505.16297; the weights are those of the student `held`."""
    values = []
    held = student if held is None else held
    for z_s, z_t, z_h in zip(student, teacher, held, strict=True):
        value = 0.0
        for a, b, c in zip(log_softmax(z_s), log_softmax(z_t), log_softmax(z_h), strict=True):
            if b == -math.inf and a == -math.inf:
                continue
            ratio = 1.0 if c == -math.inf else 1 / (1 + math.exp(c - b)) if b > -math.inf else 0.0
            if b > -math.inf:
                value += ratio * math.exp(b) * (b - a)
            if a > -math.inf:
                value += (1 - ratio) * math.exp(a) * (a - b)
        values.append(value)
    return np.array(values)


def alpha_beta(student: Array, teacher: Array, alpha: float, beta: float) -> Array:
    """Wang et al. 2025 (ABKD), arXiv 2505.04560, and the limits of its formula."""
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        value = 0.0
        for b, a in zip(log_softmax(z_s), log_softmax(z_t), strict=True):
            if a == -math.inf and b == -math.inf:
                continue
            value += alpha_beta_of_token(a, b, alpha, beta)
        values.append(value)
    return np.array(values)


def alpha_beta_of_token(log_p: float, log_q: float, alpha: float, beta: float) -> float:
    """One summand; a probability of 0 to a negative power is infinite."""
    if alpha == 0 and beta == 0:
        return (log_p - log_q) ** 2 / 2
    if alpha == 0:
        return alpha_beta_of_token(log_q, log_p, beta, alpha)
    p = math.exp(alpha * log_p)
    if beta == 0:
        q = math.exp(alpha * log_q)
        return ((alpha * (log_p - log_q) * p if p > 0 else 0.0) - p + q) / alpha**2
    if alpha + beta == 0:
        growth = alpha * (log_p - log_q)
        return (math.inf if abs(growth) == math.inf else -growth + math.expm1(growth)) / alpha**2
    total = alpha + beta
    whole = alpha / total * math.exp(total * log_p) + beta / total * math.exp(total * log_q)
    return (whole - p * math.exp(beta * log_q)) / (alpha * beta)


def decoupled(
    student: Array, teacher: Array, labels: list[int], alpha: float, beta: float
) -> Array:
    """Zhao et al. 2022 (DKD), arXiv 2203.08679: target against the rest, and within the rest."""
    values = []
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        q = [math.exp(a) for a in log_softmax(z_s)]
        p = [math.exp(a) for a in log_softmax(z_t)]
        rest_q = sum(b for v, b in enumerate(q) if v != label)
        rest_p = sum(b for v, b in enumerate(p) if v != label)
        target = p[label] * math.log(p[label] / q[label]) + rest_p * math.log(rest_p / rest_q)
        others = 0.0
        for v, (a, b) in enumerate(zip(p, q, strict=True)):
            if v != label and a > 0:
                others += a / rest_p * math.log((a / rest_p) / (b / rest_q))
        values.append(alpha * target + beta * others)
    return np.array(values)


def taid(
    losses: list[float], start: float, end: float, pace: float, momentum: float
) -> list[float]:
    """Shing et al. 2025 (TAID), arXiv 2501.16937, algorithm 1: t after each step of a training.

    A relative fall counts within [-1, 1]; a loss that is no number is no news.
    """
    shares, t, mean, before = [], start, 0.0, math.nan
    for step, loss in enumerate(losses, start=1):
        line = start + (end - start) * step / len(losses)
        if not math.isnan(loss) and not math.isnan(before):
            fall = (before - loss) / before if before else (-1.0 if loss > 0 else 0.0)
            mean = momentum * mean + (1 - momentum) * min(1.0, max(-1.0, fall))
            t += pace / (1 + math.exp(-mean)) * (1 - t)
        t = min(end, max(line, t))
        before = before if math.isnan(loss) else loss
        shares.append(t)
    return shares


def coarsen(logits: Array, ids: list[list[int]]) -> Array:
    """Log-probabilities of the kept tokens, and of all others together."""
    rows = []
    for z, kept in zip(logits, ids, strict=True):
        probabilities = [math.exp(a) for a in log_softmax(z)]
        rest = sum(b for v, b in enumerate(probabilities) if v not in kept)
        rows.append([math.log(probabilities[v]) for v in kept] + [math.log(rest)])
    return np.array(rows)


def mse(student: Array, teacher: Array) -> Array:
    """Romero et al. 2014 (FitNets), arXiv 1412.6550, equation 3, mean instead of half a sum."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        values.append(sum((float(a) - float(b)) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
    return np.array(values)


def cosine(student: Array, teacher: Array) -> Array:
    """Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 2: one minus the cosine."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        product = sum(float(a) * float(b) for a, b in zip(s, t, strict=True))
        values.append(1 - product / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t)))
    return np.array(values)


def map_kl(student: Array, teacher: Array) -> Array:
    """Wang et al. 2020 (MiniLM), arXiv 2002.10957, equation 5, per query row: mean of heads."""
    values = []
    for s_heads, t_heads in zip(student, teacher, strict=True):
        value = 0.0
        for s, t in zip(s_heads, t_heads, strict=True):
            for q, p in zip(s, t, strict=True):
                if p > 0:
                    value += p * (math.log(p) - math.log(q))
        values.append(value / len(s_heads))
    return np.array(values)


def map_mse(student: Array, teacher: Array) -> Array:
    """Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, equation 7, on probabilities."""
    values = []
    for s_heads, t_heads in zip(student, teacher, strict=True):
        value = 0.0
        for s, t in zip(s_heads, t_heads, strict=True):
            for q, p in zip(s, t, strict=True):
                value += (q - p) ** 2
        values.append(value / len(s_heads))
    return np.array(values)


def attention(
    query: Array, key: Array, bias: Array, scaling: float, softcap: float | None = None
) -> Array:
    """Attention maps of one sequence: `[H, R, d], [Hkv, T, d], [H, R, T] -> [R, H, T]`.

    Neighbouring query heads share a key head; `bias` is added to the scores, -inf where a key is
    invisible.
    """
    heads, queries, _ = query.shape
    shared = heads // len(key)
    maps = np.zeros((queries, heads, key.shape[1]))
    for head in range(heads):
        for row in range(queries):
            scores = []
            for column in range(key.shape[1]):
                score = scaling * float(query[head, row] @ key[head // shared, column])
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                scores.append(score + float(bias[head, row, column]))
            maps[row, head] = [math.exp(value) for value in log_softmax(np.array(scores))]
    return maps


def relation(vectors: Array, position: int, seen: NDArray[np.bool_], heads: int) -> Array:
    """Wang et al. 2020 (MiniLMv2), arXiv 2012.15828, section 3.1: one query row of each head.

    Vectors are `[T, D]`, all heads joined; the result is `[heads, T]`.
    """
    width = vectors.shape[1] // heads
    rows = np.zeros((heads, len(vectors)))
    for head in range(heads):
        part = vectors[:, head * width : (head + 1) * width]
        scores = [float(np.dot(part[position], other)) / math.sqrt(width) for other in part]
        visible = [score for score, there in zip(scores, seen, strict=True) if there]
        total = sum(math.exp(score - max(visible)) for score in visible)
        for place, score in enumerate(scores):
            if seen[place]:
                rows[head, place] = math.exp(score - max(visible)) / total
    return rows


def gradient(function: Callable[[Array], Array], at: Array, step: float = 1e-4) -> Array:
    """Gradient of the sum of the values, by central differences of fourth order."""
    slopes = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        values = {}
        for k in (-2, -1, 1, 2):
            moved = at.copy()
            moved[place] += k * step
            values[k] = float(function(moved).sum())
        near, far = values[1] - values[-1], values[2] - values[-2]
        slopes[place] = (8 * near - far) / (12 * step)
    return slopes
