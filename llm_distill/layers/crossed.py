"""Layer maps from how similar the student's layers are to the teacher's.

For pretrained students of another family. A student cut from its teacher, or a fresh one, looks
like the teacher's first layers wherever it has to get to: `cka` notices and leaves it to
`coverage`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_distill.layers.evidence import figures, given
from llm_distill.layers.map import LayerMap, Row
from llm_distill.layers.programmes import rising
from llm_distill.layers.refresh import check_refresh
from llm_distill.layers.segments import coverage
from llm_distill.layers.similarity import Similarity

CONTRAST = 3.0
"""Standard errors by which similarities have to differ within the rows to be more than noise."""

SMALLEST_SHARE = 0.01
"""Of a teacher layer in a transported row; smaller ones are dropped."""

TOLERANCE, MOST_STEPS = 1e-9, 10_000
"""When Sinkhorn's iteration stops: error of a marginal, and steps."""


def cka(
    student_depth: int,
    teacher_depth: int,
    *,
    cross: Similarity | None = None,
    similarity: Similarity | None = None,
    prior: float = 0.2,
    refresh: int = 0,
) -> LayerMap:
    """The strictly rising map of the most similar layers, last on last, held near the diagonal.

    Maximises the sum of M[s, t] - prior (s / Ls - t / Lt)^2, exactly. Falls back to `coverage`,
    and says so, where M says nothing (the spread within its rows is below 3 standard errors), where
    the same programme without anchor and prior stays in the first third of the teacher (its mean
    layer), and where the student is deeper than its teacher.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        cross: M, of student layers with teacher layers; measured at calibration.
        similarity: Of teacher layers with teacher layers, for the fallback.
        prior: Weight of the diagonal, >= 0.
        refresh: Steps between two looks at the student while it trains, each of which may move the
            map (`layers.refresh`), after the warm-up and until 30 % of the training; 0: none.

    Raises:
        ValueError: If a similarity is missing or has other depths, or a setting is negative.

    Source: ours; unbiased CKA as in Nguyen et al. 2020, arXiv 2010.15327.
    """
    check_refresh(refresh, "cka")
    cross, similarity = given(cross, "cka", "cross"), given(similarity, "cka", "similarity")
    values = _blocks(cross, student_depth, teacher_depth)
    offset = _offsets(student_depth, teacher_depth, prior, "cka")
    contrast, error = _contrast(cross)
    why = ""
    if student_depth > teacher_depth:
        why = "the student is deeper"
    elif contrast < CONTRAST * error:
        why = f"contrast {contrast:.2g} is below {CONTRAST:g} standard errors of {error:.2g}"
    else:
        free = rising(values, anchored=False)
        if sum(free) / len(free) <= teacher_depth / 3:
            why = f"the student looks like the teacher's first layers, {free}"
    if why:
        found = coverage(student_depth, teacher_depth, similarity=similarity)
        origin = f"{found.origin} (cka: {why})"
        return LayerMap.of(found.pairs, student_depth, teacher_depth, origin, found.evidence)
    gain = [
        [m - o for m, o in zip(*rows, strict=True)] for rows in zip(values, offset, strict=True)
    ]
    pairs = list(enumerate(rising(gain), start=1))
    mean = sum(values[s - 1][t - 1] for s, t in pairs) / len(pairs)
    evidence = (
        ("mean similarity of the pairs", mean),
        ("spread of similarities within rows", contrast),
        ("standard error of a similarity", error),
    )
    return LayerMap.of(pairs, student_depth, teacher_depth, f"cka, prior {prior:g}", evidence)


def transport(
    student_depth: int,
    teacher_depth: int,
    *,
    cross: Similarity | None = None,
    prior: float = 0.2,
    epsilon: float = 0.05,
    refresh: int = 0,
) -> LayerMap:
    """Mixtures of teacher layers, each of which is used as much as every other.

    The entropic optimal transport between the two stacks of blocks with uniform marginals and cost
    1 - M[s, t] + prior (s / Ls - t / Lt)^2. Shares below 1 % are dropped.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        cross: M, of student layers with teacher layers; measured at calibration.
        prior: Weight of the diagonal, >= 0.
        epsilon: Weight of the entropy, > 0; larger is softer.
        refresh: Steps between two looks at the student while it trains, each of which may move the
            map (`layers.refresh`), after the warm-up and until 30 % of the training; 0: none.

    Raises:
        ValueError: If there is no similarity or it has other depths, the prior is negative, or
            epsilon is not > 0.

    Source: Li et al. 2020 (BERT-EMD), arXiv 2010.06133; entropic as in Cuturi 2013, arXiv
    1306.0895.
    """
    check_refresh(refresh, "transport")
    cross = given(cross, "transport", "cross")
    values = _blocks(cross, student_depth, teacher_depth)
    offset = _offsets(student_depth, teacher_depth, prior, "transport")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"layers: transport has epsilon {epsilon}; write a number > 0, as 0.05")
    cost = 1 - torch.tensor(values, dtype=torch.float64) + torch.tensor(offset, dtype=torch.float64)
    plan = sinkhorn(cost, epsilon)
    rows = tuple(Row(s, _sparse(row)) for s, row in enumerate(plan.tolist(), start=1))
    origin = f"transport, prior {prior:g}, epsilon {epsilon:g}"
    price = float((plan * cost).sum())
    return LayerMap(
        rows, student_depth, teacher_depth, origin, evidence=(("cost of the transport", price),)
    )


def sinkhorn(cost: Tensor, epsilon: float) -> Tensor:
    """The plan of entropic optimal transport, uniform marginals: `[R, C] -> [R, C]` in float64.

    Iterates potentials in the log domain, so that no small epsilon underflows. Columns are exact;
    rows are to 1e-9, or as near as 10 000 steps come for an epsilon far below the costs.

    Source: Cuturi 2013, arXiv 1306.0895; log domain as in Peyre and Cuturi 2018, arXiv 1803.00567,
    section 4.4.

    >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1.0)
    tensor([[0.3655, 0.1345],
            [0.1345, 0.3655]], dtype=torch.float64)
    """
    rows, columns = cost.shape
    gain = -cost.double() / epsilon
    of_row, of_column = -math.log(rows), -math.log(columns)
    right = torch.zeros(columns, dtype=gain.dtype)
    plan = gain
    for _ in range(MOST_STEPS):
        left = of_row - torch.logsumexp(gain + right, 1)
        right = of_column - torch.logsumexp(gain + left[:, None], 0)
        plan = (gain + left[:, None] + right).exp()
        if (plan.sum(1) - 1 / rows).abs().max() < TOLERANCE:
            break
    return plan


def _sparse(shares: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Shares of blocks 1.. without the small ones, summing to 1."""
    total = sum(shares)
    # Of hundreds of blocks each may have less than the limit: the largest always stay.
    least = min(SMALLEST_SHARE, max(shares) / total / 2)
    kept = [(t, share) for t, share in enumerate(shares, start=1) if share / total >= least]
    left = sum(share for _, share in kept)
    return tuple((t, share / left) for t, share in kept)


def _blocks(cross: Similarity, student_depth: int, teacher_depth: int) -> list[list[float]]:
    """M without the embeddings: `[Ls][Lt]`."""
    values = figures(cross, student_depth, teacher_depth, "cross")
    return [row[1:] for row in values[1:]]


def _offsets(student_depth: int, teacher_depth: int, prior: float, name: str) -> list[list[float]]:
    """What distance from the diagonal costs: `[Ls][Lt]`."""
    if not 0 <= prior < math.inf:
        raise ValueError(f"layers: {name} has prior {prior}; write a number >= 0, as 0.2")
    return [
        [prior * (s / student_depth - t / teacher_depth) ** 2 for t in range(1, teacher_depth + 1)]
        for s in range(1, student_depth + 1)
    ]


def _contrast(cross: Similarity) -> tuple[float, float]:
    """Root mean square spread of M within its rows, and of its standard errors.

    Noise alone spreads by one standard error; the range of a row would grow with its length.
    """
    values, errors = cross.values[1:, 1:].double(), cross.errors[1:, 1:].double()
    spread = values.var(1, correction=0).mean().sqrt()
    return float(spread), float(errors.square().mean().sqrt())
