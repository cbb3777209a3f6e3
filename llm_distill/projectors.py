"""From the student's width to the teacher's.

A projector is a function of the two widths that returns a module; it is trained with the student,
lives in the checkpoints, and is never part of the exported student.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

RIDGE = 0.03
"""Of least squares, as a fraction of the mean variance. Directions with less hardly count: the
student moves along them as soon as it trains, and a small ridge makes much of it."""

__all__ = ["identity", "linear", "mlp", "none", "orthogonal"]


def identity(student_width: int, teacher_width: int) -> nn.Module:
    """No projection, for equal widths.

    Raises:
        ValueError: If the widths differ.

    >>> identity(8, 8)
    Identity()
    """
    if student_width != teacher_width:
        raise ValueError(
            f"projector: identity needs equal widths; student {student_width}, teacher "
            f"{teacher_width}; "
            "use projector: linear"
        )
    return nn.Identity()


def linear(student_width: int, teacher_width: int) -> nn.Module:
    """One affine map of every token, `[N, Ds] -> [N, Dt]`.

    Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, section 2.2 (there a convolution).

    >>> linear(4, 8)
    Linear(in_features=4, out_features=8, bias=True)
    """
    return nn.Linear(student_width, teacher_width)


def mlp(student_width: int, teacher_width: int, *, hidden: int | None = None) -> nn.Module:
    """Two layers with a GELU between, for every token, `[N, Ds] -> [N, Dt]`.

    Args:
        student_width: Features of a student's state.
        teacher_width: Features of a teacher's.
        hidden: Features between the layers; by default the larger of both widths.

    Raises:
        ValueError: If `hidden` is < 1.

    Source: Chen et al. 2022 (projector ensembles), arXiv 2210.15274, which compares such depths.

    >>> [tuple(p.shape) for p in mlp(4, 8).parameters()]
    [(8, 4), (8,), (8, 8), (8,)]
    """
    if hidden is not None and hidden < 1:
        raise ValueError(f"projector: mlp has hidden={hidden}; write a width from 1 on")
    width = max(student_width, teacher_width) if hidden is None else hidden
    return nn.Sequential(
        nn.Linear(student_width, width), nn.GELU(), nn.Linear(width, teacher_width)
    )


def none(student_width: int, teacher_width: int) -> nn.Module:
    """No projection whatever the widths, for losses that relate items within one model.

    >>> none(4, 8)
    Identity()
    """
    del student_width, teacher_width
    return nn.Identity()


def orthogonal(student_width: int, teacher_width: int) -> nn.Module:
    """A rotation into (or projection onto) the teacher's space and a shift, `[N, Ds] -> [N, Dt]`.

    The weight keeps orthonormal columns (rows for a narrower teacher) throughout the training, so
    that distances and angles between the student's states arrive as they are, and nothing can be
    learned here that the student should learn. Departs from the source by its bias: residual
    streams have a mean far from zero.

    Source: Miles et al. 2024 (VkD), arXiv 2403.06213, section 3.

    >>> projector = orthogonal(4, 8)
    >>> bool((projector.weight.T @ projector.weight - torch.eye(4)).abs().max() < 1e-5)
    True
    """
    module = nn.Linear(student_width, teacher_width)
    nn.init.zeros_(module.bias)
    # Cayley's map is one solve for any two widths. Torch's own choices take seven times as long
    # (512 to 1024), and weight decay breaks that for unequal ones: it truncates a diagonal of -1.
    return parametrizations.orthogonal(module, orthogonal_map="cayley")


@dataclass
class Moments:
    """What a closed form needs of calibration rows, whose number it does not grow with.

    Attributes:
        rows: How many, N.
        student: Sum of the student's rows, about `origin`: `[Ds]`.
        teacher: The same of what they should become: `[Dt]`.
        gram: `X^T X` about the origins: `[Ds, Ds]`.
        cross: `Y^T X`: `[Dt, Ds]`.
        square: `|Y|^2`.
        origin: Means of the first rows: sums about 0 lose all digits where a mean is large.

    >>> told = Moments.of(torch.eye(2), torch.ones(2, 3))
    >>> told.add(torch.eye(2), torch.zeros(2, 3)).rows
    4
    """

    rows: int
    student: Tensor
    teacher: Tensor
    gram: Tensor
    cross: Tensor
    square: Tensor
    origin: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> Moments:
        """Of rows `[N, Ds]` and what they should become, `[N, Dt]`."""
        x, y = student.detach().double(), teacher.detach().double()
        ours, theirs = x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1])
        gram, cross = torch.outer(ours, ours), torch.outer(theirs, ours)
        origin = (x.mean(0), y.mean(0)) if len(x) else (ours.clone(), theirs.clone())
        return cls(0, ours, theirs, gram, cross, x.new_zeros(()), origin).add(student, teacher)

    def add(self, student: Tensor, teacher: Tensor) -> Moments:
        """The same, with further rows."""
        x = student.detach().double() - self.origin[0]
        y = teacher.detach().double() - self.origin[1]
        self.rows += len(x)
        self.student += x.sum(0)
        self.teacher += y.sum(0)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(y.T, x)
        self.square += y.square().sum()
        return self

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """`X^T X`, `Y^T X` and `|Y|^2` about the means."""
        gram = self.gram - torch.outer(self.student, self.student) / self.rows
        cross = self.cross - torch.outer(self.teacher, self.student) / self.rows
        return gram, cross, self.square - self.teacher.square().sum() / self.rows

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of the student's rows and of the teacher's."""
        ours, theirs = self.origin
        return ours + self.student / self.rows, theirs + self.teacher / self.rows


def fit(projector: nn.Module, told: Moments) -> float:
    """Set a projector to its closed-form optimum, and tell the share of the variance that is left.

    Args:
        projector: From `linear` or `orthogonal`; written in place.
        told: Of calibration rows.

    Returns:
        The share of the teacher's variance that is left; above 1 only where an orthogonal map,
        which cannot scale, adds to it.

    Raises:
        ValueError: For a projector without a closed form.
    """
    affine = checked_fit(projector)
    fitted = fit_procrustes if is_parametrized(affine, "weight") else fit_least_squares
    return fitted(affine, told)


def checked_fit(projector: nn.Module) -> nn.Linear:
    """The projector, if it has a closed-form optimum.

    Raises:
        ValueError: If it has none.
    """
    if isinstance(projector, nn.Linear) and projector.bias is not None:
        return projector
    raise ValueError(
        f"projector: {type(projector).__name__} has no closed-form optimum; write projector: "
        "linear or orthogonal, or init: random"
    )


def fit_procrustes(projector: nn.Linear, told: Moments) -> float:
    """Set an orthogonal projector to the nearest rigid map, and tell the residual share.

    The bias takes the means; for the rest `W = V U^T` with `X^T Y = U S V^T`. That is the optimum
    unless the teacher is narrower: then it is the start of steps that never lose.

    Source: Schoenemann 1966 (orthogonal Procrustes); the steps: Bojanczyk and Lutoborski 1999, the
    unbalanced problem, here by majorisation.
    """
    (x_mean, y_mean), (gram, cross, square) = told.means, told.centred()
    weight = _polar(cross)
    if len(weight) < weight.shape[1]:
        weight = _descend(weight, gram, cross)
    # What torch completes a weight that is not square with is drawn: not from others' numbers.
    place = projector.bias.device
    devices = [place] if place.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        projector.weight = weight.to(projector.bias)
        projector.bias.copy_(y_mean - weight @ x_mean)
    return _left(weight, gram, cross, square)


def _left(weight: Tensor, gram: Tensor, cross: Tensor, square: Tensor) -> float:
    """`|Y - X W^T|^2 / |Y|^2`."""
    left = square - 2 * (weight * cross).sum() + (weight @ gram * weight).sum()
    return float(left.clamp_min(0.0) / square.clamp_min(1e-30))


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows: `[m, n] -> [m, n]`."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _descend(weight: Tensor, gram: Tensor, cross: Tensor, *, steps: int = 100) -> Tensor:
    """Lower `|X W^T - Y|^2` over weights with orthonormal rows, which also choose a subspace.

    With `G = X^T X` the term `tr(W (G - lambda_max I) W^T)` is concave, so it lies below its
    tangent plane, and a step to the lowest point there is a polar factor.
    """
    slack = -gram
    slack.diagonal().add_(torch.linalg.matrix_norm(gram, 2))
    for _ in range(steps):
        before, weight = weight, _polar(weight @ slack + cross)
        if (weight - before).norm() < 1e-9 * weight.norm():
            break
    return weight


def fit_least_squares(projector: nn.Linear, told: Moments, *, ridge: float = RIDGE) -> float:
    """Set an affine projector to the ridge optimum, and tell the residual share.

    Args:
        projector: Written in place; it needs a bias.
        told: Of calibration rows.
        ridge: Penalty as a fraction of the mean variance of the student's features, so that fewer
            rows than features still give one well-conditioned answer.

    Returns:
        The share of the teacher's variance that is left, 0 (perfect) to 1.
    """
    (x_mean, y_mean), (gram, cross, square) = told.means, told.centred()
    penalty = ridge * gram.diagonal().mean().clamp_min(1e-12)
    penalised = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(penalised, cross.T).T
    with torch.no_grad():
        projector.weight.copy_(weight)
        projector.bias.copy_(y_mean - weight @ x_mean)
    return _left(weight, gram, cross, square)
