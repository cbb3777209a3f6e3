"""Distances between hidden states that already have one width.

Projection, normalisation and the choice of rows are `llm_distill.HiddenStates`' business.
"""

import math

import torch
from torch import Tensor

from llm_distill.losses.softmax import wide

__all__ = ["cosine", "huber", "mse"]

SHORTEST = 1e-6
"""Vectors shorter than this have no direction: the gradient of one grows like 1 / length."""


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the features: `[N, D], [N, D] -> [N]`.

    Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, equation 3 (there a sum over features,
    half of it).

    >>> mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    return (wide(student) - wide(teacher)).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance, 1 - cos, in [0, 2]: `[N, D], [N, D] -> [N]`.

    Computed as half the squared distance of the two unit vectors, which is exactly 0 at identity
    and has a finite gradient there. A vector shorter than `SHORTEST` counts as zero and gets no
    gradient: its distance is 1/2 to every vector with a direction, and 0 to another zero vector.

    Source: Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 2.

    >>> cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([1., 0.])
    """
    return 0.5 * (unit(student) - unit(teacher)).square().sum(-1)


def huber(student: Tensor, teacher: Tensor, *, delta: float = 1.0) -> Tensor:
    """Squared error near 0, absolute error beyond, mean over features: `[N, D], [N, D] -> [N]`.

    Formula: `e^2 / 2` where |e| < delta, `delta (|e| - delta / 2)` elsewhere. One massive
    activation then counts like its size, not like its square.

    Args:
        student: Hidden states.
        teacher: Hidden states.
        delta: Error at which the square ends, in units of the states.

    Raises:
        ValueError: If delta is not above 0.

    Source: Huber 1964 (Annals of Mathematical Statistics 35), section 4.

    >>> huber(torch.tensor([[1.0, 4.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([1.2500])
    """
    check_delta("huber", delta)
    return bent(wide(student) - wide(teacher), delta).mean(-1)


def bent(errors: Tensor, delta: float) -> Tensor:
    """A square near 0, a line of the slope `delta` beyond it: any shape, kept."""
    sizes = errors.abs()
    return torch.where(sizes < delta, 0.5 * errors.square(), delta * (sizes - 0.5 * delta))


def check_delta(loss: str, delta: float) -> None:
    """Refuse a Huber threshold that leaves no square.

    Raises:
        ValueError: If delta is not a number above 0.
    """
    if not 0.0 < delta < math.inf:
        raise ValueError(
            f"{loss}: delta={delta} is not inside (0, inf); it is the error at which the square "
            "ends, 1.0 in the papers"
        )


def unit(vectors: Tensor) -> Tensor:
    """Divided by their length; 0, with gradient 0, where that is ~0: `[N, D] -> [N, D]`."""
    vectors = wide(vectors)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(length < SHORTEST, 0.0, vectors / length.clamp_min(SHORTEST))
