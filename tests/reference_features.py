"""Every loss between hidden states once more, as loops over Python floats in float64.

No torch and nothing from the package: what is tested and what it is tested against share no code.
All return one value per row, whose mean is the published loss.
"""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from tests.reference import Array

Vector = Sequence[float]


def dot(x: Vector, y: Vector) -> float:
    """Inner product."""
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def distance(x: Vector, y: Vector) -> float:
    """Euclidean."""
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)))


def huber_of(error: float, delta: float) -> float:
    """Huber 1964: a square near 0, a line beyond."""
    return error**2 / 2 if abs(error) < delta else delta * (abs(error) - delta / 2)


def huber(student: Array, teacher: Array, delta: float = 1.0) -> Array:
    """Mean over features."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        values.append(
            sum(huber_of(float(a - b), delta) for a, b in zip(s, t, strict=True)) / len(s)
        )
    return np.array(values)


def energies(states: Array, power: float) -> list[float]:
    """Zagoruyko and Komodakis 2016, arXiv 1612.03928: over positions, as a vector of length 1."""
    raw = [sum(abs(float(h)) ** power for h in row) for row in states]
    length = math.sqrt(sum(q * q for q in raw))
    return [q / length if length else 0.0 for q in raw]


def attention_transfer(student: Array, teacher: Array, power: float = 2.0) -> Array:
    """Zagoruyko and Komodakis 2016, arXiv 1612.03928, equation 2, squared: N times its summands."""
    pairs = zip(energies(student, power), energies(teacher, power), strict=True)
    return np.array([len(student) * (a - b) ** 2 for a, b in pairs])


def centred(items: Array) -> list[list[float]]:
    """Minus the mean item."""
    mean = [sum(float(h) for h in column) / len(items) for column in items.T]
    return [[float(h) - m for h, m in zip(row, mean, strict=True)] for row in items]


def neighbourhood(items: Array, i: int) -> dict[int, float]:
    """Passalis and Tefas 2018, arXiv 1803.10837: the cosine kernel over all others, as shares."""
    x = centred(items)
    kernel = {}
    for j in range(len(x)):
        if j != i:
            cosine = dot(x[i], x[j]) / math.sqrt(dot(x[i], x[i]) * dot(x[j], x[j]))
            kernel[j] = (cosine + 1) / 2
    total = sum(kernel.values())
    return {j: k / total for j, k in kernel.items()}


def pkt(student: Array, teacher: Array) -> Array:
    """Passalis and Tefas 2018, arXiv 1803.10837: KL of each item's neighbourhood."""
    values = []
    for i in range(len(student)):
        q, p = neighbourhood(student, i), neighbourhood(teacher, i)
        values.append(sum(p[j] * math.log(p[j] / q[j]) for j in p))
    return np.array(values)


def relative_distances(items: Array) -> dict[tuple[int, int], float]:
    """Park et al. 2019, arXiv 1904.05068: over their mean."""
    n = len(items)
    all_of_them = {
        (i, j): distance(items[i], items[j]) for i, j in product(range(n), repeat=2) if i != j
    }
    mean = sum(all_of_them.values()) / len(all_of_them)
    return {pair: d / mean if mean else 0.0 for pair, d in all_of_them.items()}


def rkd_distance(student: Array, teacher: Array, delta: float = 1.0) -> Array:
    """Park et al. 2019, arXiv 1904.05068, the distances of distinct items."""
    n = len(student)
    ours, theirs = relative_distances(student), relative_distances(teacher)
    values = []
    for i in range(n):
        errors = [huber_of(ours[i, j] - theirs[i, j], delta) for j in range(n) if j != i]
        values.append(sum(errors) / len(errors))
    return np.array(values)


def angle(items: Array, i: int, j: int, k: int) -> float | None:
    """Cosine of the angle at i; there is none at or to an equal item."""
    first, second = items[j] - items[i], items[k] - items[i]
    lengths = math.sqrt(dot(first, first) * dot(second, second))
    return dot(first, second) / lengths if lengths else None


def rkd_angle(student: Array, teacher: Array, delta: float = 1.0) -> Array:
    """Park et al. 2019, arXiv 1904.05068, the angles of distinct items."""
    n = len(student)
    values = []
    for i in range(n):
        total, count = 0.0, 0
        for j, k in product(range(n), repeat=2):
            if len({i, j, k}) < 3:
                continue
            count += 1
            ours, theirs = angle(student, i, j, k), angle(teacher, i, j, k)
            if ours is not None and theirs is not None:
                total += huber_of(ours - theirs, delta)
        values.append(total / count)
    return np.array(values)


def neurons(states: Array) -> list[list[float]]:
    """Columns, of length 1."""
    points = []
    for column in states.T:
        length = math.sqrt(dot(column, column))
        points.append([float(h) / length if length else 0.0 for h in column])
    return points


def discrepancy(student: Array, teacher: Array, kernel: str) -> float:
    """Huang and Wang 2017, arXiv 1707.01219: squared MMD, with all pairs of neurons formed."""
    s, t = neurons(student), neurons(teacher)
    squares = [distance(x, y) ** 2 for x, y in product(s + t, repeat=2)]
    spread = sum(squares) / len(squares)

    def alike(x: Vector, y: Vector) -> float:
        if kernel == "gaussian":
            return math.exp(-(distance(x, y) ** 2) / (2 * spread)) if spread else 1.0
        return dot(x, y) ** 2 if kernel == "polynomial" else dot(x, y)

    def mean(left: list[list[float]], right: list[list[float]]) -> float:
        return sum(alike(x, y) for x, y in product(left, right)) / (len(left) * len(right))

    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


def nst(student: Array, teacher: Array, kernel: str) -> Array:
    """Split over rows as the package says: the mean is the discrepancy."""
    n, s, t = len(student), neurons(student), neurons(teacher)
    if kernel == "gaussian":
        return np.full(n, discrepancy(student, teacher, kernel))
    values = []
    for i in range(n):
        value = 0.0
        if kernel == "linear":
            value = (sum(x[i] for x in s) / len(s) - sum(y[i] for y in t) / len(t)) ** 2
        else:
            for j in range(n):
                ours = sum(x[i] * x[j] for x in s) / len(s)
                value += (ours - sum(y[i] * y[j] for y in t) / len(t)) ** 2
        values.append(n * value)
    return np.array(values)


def hsic(gram: Array, other: Array) -> float:
    """Song et al. 2012 (JMLR 13): the unbiased estimate from sums, without any centring."""
    n = len(gram)
    k, m = gram.copy(), other.copy()
    for i in range(n):
        k[i, i] = m[i, i] = 0.0
    trace = sum(float(k[i, j] * m[j, i]) for i, j in product(range(n), repeat=2))
    sums = float(k.sum() * m.sum()) / ((n - 1) * (n - 2))
    rows = sum(float(k[i].sum() * m[i].sum()) for i in range(n)) * 2 / (n - 2)
    return (trace + sums - rows) / (n * (n - 3))


def gram(items: Array) -> Array:
    """Inner products of all pairs."""
    return np.array([[dot(x, y) for y in items] for x in items])


def unbiased_cka(x: Array, y: Array) -> float:
    """Nguyen et al. 2020, arXiv 2010.15327, of one batch."""
    k, m = gram(x), gram(y)
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def u_centred(matrix: Array) -> Array:
    """Szekely and Rizzo 2014, arXiv 1310.2926, definition 2."""
    n = len(matrix)
    off = matrix.copy()
    for i in range(n):
        off[i, i] = 0.0
    result = np.zeros((n, n))
    for i, j in product(range(n), repeat=2):
        if i != j:
            means = float(off[i].sum() + off[:, j].sum()) / (n - 2)
            result[i, j] = off[i, j] - means + float(off.sum()) / ((n - 1) * (n - 2))
    return result


def cka(student: Array, teacher: Array) -> Array:
    """Split over rows as the package says: the mean is one minus the unbiased CKA."""
    s, t = u_centred(gram(student)), u_centred(gram(teacher))
    s, t = s / math.sqrt((s * s).sum()), t / math.sqrt((t * t).sum())
    return np.array([len(s) / 2 * distance(a, b) ** 2 for a, b in zip(s, t, strict=True)])


def info_nce(
    student: Array,
    teacher: Array,
    temperature: float,
    candidates: tuple[Array, Array] | None = None,
    offset: int = 0,
    queue: Array | None = None,
    blocked: Array | None = None,
) -> Array:
    """van den Oord et al. 2018, arXiv 1807.03748, in both directions, half of each."""
    students, teachers = candidates or (student, teacher)
    longer = [*teachers, *(queue if queue is not None else [])]
    values = []
    for i in range(len(student)):
        value = 0.0
        for anchor, others in ((student[i], longer), (teacher[i], list(students))):
            scores = {
                j: dot(anchor, other) / math.sqrt(dot(anchor, anchor) * dot(other, other))
                for j, other in enumerate(others)
                if j == offset + i or blocked is None or not hides(blocked[i], j)
            }
            total = sum(math.exp(score / temperature) for score in scores.values())
            value += math.log(total) - scores[offset + i] / temperature
        values.append(value / 2)
    return np.array(values)


def hides(blocked: Array, column: int) -> bool:
    """Whether a candidate is left out; a queue without columns is not."""
    return column < len(blocked) and bool(blocked[column])
