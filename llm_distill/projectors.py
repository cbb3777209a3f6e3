"""From the student's width to the teacher's.

A projector is a function of the two widths that returns a module; it is trained with the student,
lives in the checkpoints, and is never part of the exported student.
"""

import torch
from torch import Tensor, nn

__all__ = ["identity", "linear"]


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


def fit_least_squares(
    projector: nn.Linear, student: Tensor, teacher: Tensor, *, ridge: float = 1e-4
) -> float:
    """Set an affine projector to the ridge optimum: `[N, Ds], [N, Dt] -> residual share`.

    Args:
        projector: Written in place; it needs a bias.
        student: Calibration rows.
        teacher: What they should become.
        ridge: Penalty as a fraction of the mean variance of the student's features, so that fewer
            rows than features still give one well-conditioned answer.

    Returns:
        The share of the teacher's variance that is left, 0 (perfect) to 1.
    """
    x, y = student.detach().double(), teacher.detach().double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    penalty = ridge * gram.diagonal().mean().clamp_min(1e-12)
    weight = torch.linalg.solve(
        gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.T @ y
    ).T
    with torch.no_grad():
        projector.weight.copy_(weight)
        projector.bias.copy_(y_mean - weight @ x_mean)
    left = (y - x @ weight.T).square().sum() / y.square().sum().clamp_min(1e-30)
    return float(left)
