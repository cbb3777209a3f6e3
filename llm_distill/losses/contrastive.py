"""Contrast: a student's embedding should point to its own teacher's among all others."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.features import unit
from llm_distill.losses.groups import check_rows

__all__ = ["info_nce"]


def info_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.07,
    candidates: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    queue: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE, positives on the diagonal: `[N, P], [N, P] -> [N]`, nats.

    Row i is half of two cross-entropies over cosines divided by the temperature: that of finding
    teacher i from student i among all teachers, and that of finding student i from teacher i among
    all students. Embeddings are scaled to length 1 here. A row that has nothing to choose from
    reads 0, and `log(candidates) - mean` bounds the mutual information from below.

    It departs from the paper, which scores pairs with a noise-contrastive critic against a memory
    of the whole data set: a stream of text has no indices to remember.

    Args:
        student: Embeddings of the anchors.
        teacher: Embeddings of the same items.
        temperature: What cosines are divided by, above 0.
        candidates: Students and teachers to choose from, `[M, P]` each, when they are more than the
            anchors: those of all ranks. The anchors' own are at `offset` to `offset + N`.
        offset: Where the anchors begin among the candidates.
        queue: Teachers' embeddings of earlier steps, `[Q, P]`: negatives of the students alone.
        blocked: `[N, M]` or `[N, M + Q]`, True where candidate j is no negative of anchor i (the
            same token, say). The own pair is never blocked; a queue without columns is not either.

    Raises:
        ValueError: If the temperature is not above 0, if the two models have different numbers of
            rows, if the anchors do not fit among the candidates, or if `blocked` has another shape.

    Source: van den Oord et al. 2018 (InfoNCE), arXiv 1807.03748, equation 4; between a student and
    a teacher: Tian et al. 2019 (CRD), arXiv 1910.10699.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # log(1 + 1 / e)
    tensor([0.3133, 0.3133])
    """
    check_rows("info_nce", student, teacher)
    ours, theirs = unit(student), unit(teacher)
    students, teachers = (ours, theirs) if candidates is None else map(unit, candidates)
    anchors, count = len(ours), len(teachers)
    _check(temperature, anchors, count, offset)
    waiting = teachers[:0] if queue is None else unit(queue)
    own = offset + torch.arange(anchors, device=ours.device)
    hidden = _hidden(blocked, own, count, len(waiting))
    find_teacher = ours @ torch.cat([teachers, waiting]).mT / temperature
    find_student = theirs @ students.mT / temperature
    return 0.5 * (
        _cross_entropy(find_teacher, own, hidden)
        + _cross_entropy(find_student, own, hidden if hidden is None else hidden[:, :count])
    )


def _cross_entropy(logits: Tensor, own: Tensor, hidden: Tensor | None) -> Tensor:
    """Of the own column among those not hidden: `[N, M], [N], [N, M] -> [N]`."""
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    return F.cross_entropy(logits, own, reduction="none")


def _hidden(blocked: Tensor | None, own: Tensor, count: int, waiting: int) -> Tensor | None:
    """Which candidates are left out: `blocked` but for the own pair, and for all of the queue."""
    if blocked is None:
        return None
    n = len(own)
    if blocked.shape not in ((n, count), (n, count + waiting)):
        raise ValueError(
            f"info_nce: blocked is {list(blocked.shape)}; for {n} anchors, {count} candidates and "
            f"a queue of {waiting} give [{n}, {count}] or [{n}, {count + waiting}]"
        )
    columns = torch.arange(count + waiting, device=own.device)
    missing = count + waiting - blocked.shape[1]
    return F.pad(blocked, (0, missing)) & (columns != own[:, None])


def _check(temperature: float, anchors: int, candidates: int, offset: int) -> None:
    """Refuse settings without a meaning."""
    if not temperature > 0.0:
        raise ValueError(f"info_nce: temperature={temperature} is not above 0; CRD takes 0.07")
    if offset < 0 or offset + anchors > candidates:
        raise ValueError(
            f"info_nce: {anchors} anchors from offset {offset} do not fit among {candidates} "
            "candidates; give the students and teachers of all ranks, and where this rank begins"
        )
