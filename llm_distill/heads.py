"""Which head learns from which, where the two models have different numbers of heads.

A rule takes the maps of one layer pair, `[N, Hs, T]` and `[N, Ht, T]`, and returns both with one
head count.
"""

import torch
from torch import Tensor

__all__ = ["group", "match", "mean"]


def mean(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average all heads of each model: `[N, Hs, T], [N, Ht, T] -> [N, 1, T] x2`.

    >>> [tuple(m.shape) for m in mean(torch.rand(5, 3, 7), torch.rand(5, 8, 7))]
    [(5, 1, 7), (5, 1, 7)]
    """
    return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)


def group(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average neighbouring heads where there are more: `[N, Hs, T], [N, Ht, T] -> [N, min, T] x2`.

    Raises:
        ValueError: If one head count does not divide the other.

    >>> [tuple(m.shape) for m in group(torch.rand(5, 2, 7), torch.rand(5, 8, 7))]
    [(5, 2, 7), (5, 2, 7)]
    """
    few = min(student.shape[1], teacher.shape[1])
    check_group(student.shape[1], teacher.shape[1])
    return _grouped(student, few), _grouped(teacher, few)


def match(student: Tensor, teacher: Tensor, *, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """Each student head has one teacher head: `[N, Hs, T], [N, Ht, T] -> [N, Hs, T] x2`.

    Args:
        student: Maps.
        teacher: Maps.
        assignment: `[Hs]`, the teacher's head of each student head, decided once at calibration
            (`best_match`).
    """
    return student, teacher.index_select(1, assignment)


def best_match(student: Tensor, teacher: Tensor) -> Tensor:
    """One-to-one, with the least Jensen-Shannon divergence: `[N, Hs, T], [N, Ht, T] -> [Hs]`.

    Raises:
        ValueError: If the student has more heads than the teacher.

    Source: the Hungarian method (Kuhn 1955), as in `scipy.optimize.linear_sum_assignment`.
    """
    from scipy.optimize import linear_sum_assignment

    check_match(student.shape[1], teacher.shape[1])
    # Row by row: all rows at once would take N Hs Ht T numbers, many gigabytes.
    cost = sum(
        (_divergences(s, t) for s, t in zip(student, teacher, strict=True)),
        start=student.new_zeros(student.shape[1], teacher.shape[1], dtype=torch.float64),
    )
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, dtype=torch.long)


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon between every two heads of one query row: `[Hs, T], [Ht, T] -> [Hs, Ht]`."""
    s, t = student.detach().double().unsqueeze(1), teacher.detach().double().unsqueeze(0)
    middle = 0.5 * (s + t)
    gap = 0.5 * (torch.xlogy(s, s) + torch.xlogy(t, t)) - torch.xlogy(middle, middle)
    return gap.sum(-1)


def check_group(student_heads: int, teacher_heads: int) -> None:
    """Refuse head counts that do not divide.

    Raises:
        ValueError: Naming both counts.
    """
    few, many = sorted((student_heads, teacher_heads))
    if many % few:
        raise ValueError(
            f"heads: group needs one head count to divide the other; student {student_heads}, "
            "teacher "
            f"{teacher_heads}; use heads: mean (any counts)"
        )


def check_match(student_heads: int, teacher_heads: int) -> None:
    """Refuse a student with more heads than its teacher.

    Raises:
        ValueError: Naming both counts.
    """
    if student_heads > teacher_heads:
        raise ValueError(
            "heads: match gives each student head a teacher head of its own; student "
            f"{student_heads}, teacher "
            f"{teacher_heads}; use heads: mean or group"
        )


def _grouped(maps: Tensor, heads: int) -> Tensor:
    """Neighbouring heads averaged into `heads` groups: `[N, H, T] -> [N, heads, T]`."""
    if maps.shape[1] == heads:
        return maps
    grouped: Tensor = maps.unflatten(1, (heads, -1))
    return grouped.mean(2)
