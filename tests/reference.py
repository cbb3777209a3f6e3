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
        log_m = []
        for a, b in zip(log_p, log_q, strict=True):
            mixed = beta * math.exp(a) + (1 - beta) * math.exp(b)
            log_m.append(math.log(mixed) if mixed > 0 else -math.inf)
        values.append(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))
    return np.array(values)


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
