"""Neuron selectivity transfer: the two models' neurons as two clouds of points.

A neuron is a point: its activations at the rows of a group, scaled to length 1. Which student's
neuron belongs to which teacher's is never asked, so widths may differ without a projector.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from llm_distill.losses.features import unit
from llm_distill.losses.groups import is_small, silent
from llm_distill.losses.softmax import wide

__all__ = ["nst"]

Kernel = Literal["polynomial", "linear", "gaussian"]

NARROWEST = 1e-6
"""Mean squared distance of points of length 1 below which they are all one point."""


def nst(
    student: Tensor, teacher: Tensor, *, kernel: Kernel = "polynomial", neurons: int = 1024
) -> Tensor:
    """Squared maximum mean discrepancy of the two sets of neurons: `[N, D], [N, D'] -> [N]`.

    Formula: `mean k(t, t') + mean k(s, s') - 2 mean k(s, t)` over pairs of neurons. How it is split
    over the rows, so that their mean is this value:

    * `polynomial`, k = (x . y)^2: it equals `|Gs - Gt|^2` with G the mean over neurons of their
      outer products, N x N. No pair of neurons is formed. Row i reads N times row i of the square.
    * `linear`, k = x . y: row i reads N times the squared difference of the mean neuron at i.
    * `gaussian`, k = exp(-|x - y|^2 / (2 b)): every row reads the whole value. b is the mean
      squared distance of all pairs, of both models together, and is differentiated. Pairs are
      formed: wider models are represented by `neurons` of them, evenly spaced.

    Neurons that are 0 on all rows are the point 0. A group of one row reads 0.

    Args:
        student: Hidden states, not normalised; the rows are what a neuron's point is made of.
        teacher: Hidden states, not normalised.
        kernel: How alike two neurons are.
        neurons: Neurons of a model that the Gaussian kernel takes at most.

    Raises:
        ValueError: If the kernel is not one of the three, if `neurons` is below 1, or if the two
            models have different numbers of rows.

    Source: Huang and Wang 2017 (NST), arXiv 1707.01219, section 4.

    >>> turned = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> nst(turned, torch.tensor([[0.0, -2.0], [1.0, 0.0]]))  # swapped, scaled, one sign flipped
    tensor([0., 0.])
    >>> nst(turned, turned[:1].expand(2, 2))
    tensor([0.2500, 0.2500])
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"nst: kernel={kernel!r}; write one of {', '.join(get_args(Kernel))}")
    if neurons < 1:
        raise ValueError(f"nst: neurons={neurons}; take 1 or more, 1024 by default")
    if is_small("nst", student, teacher, least=2):
        return silent(student)
    n = len(student)
    ours, theirs = _points(student), _points(teacher)
    if kernel == "polynomial":
        return n * (_row_gram(ours) - _row_gram(theirs)).square().sum(-1)
    if kernel == "linear":
        return n * (ours.mean(0) - theirs.mean(0)).square()
    return _gaussian(_some(ours, neurons), _some(theirs, neurons)).expand(n)


def _points(states: Tensor) -> Tensor:
    """Neurons, that is columns, of length 1, or 0: `[N, D] -> [D, N]`."""
    return unit(wide(states).mT)


def _row_gram(points: Tensor) -> Tensor:
    """Mean over neurons of their outer products: `[D, N] -> [N, N]`."""
    return points.mT @ points / len(points)


def _some(points: Tensor, most: int) -> Tensor:
    """At most so many, evenly spaced: `[D, N] -> [D', N]`."""
    if len(points) <= most:
        return points
    return points[torch.arange(most, device=points.device) * len(points) // most]


def _gaussian(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared discrepancy under a Gaussian kernel: `[D, N], [D', N] -> []`."""
    within, without, across = (
        _squared_distances(x, y) for x, y in ((ours, ours), (theirs, theirs), (ours, theirs))
    )
    pairs = (len(ours) + len(theirs)) ** 2
    spread = (within.sum() + without.sum() + 2 * across.sum()) / pairs
    width = torch.where(spread > NARROWEST, 2 * spread, 1.0)
    own, other, both = ((-d / width).exp().mean() for d in (within, without, across))
    return own + other - 2 * both


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Of all pairs of points: `[D, N], [D', N] -> [D, D']`."""
    sizes = x.square().sum(-1)[:, None] + y.square().sum(-1)
    return (sizes - 2 * x @ y.mT).clamp_min(0)
