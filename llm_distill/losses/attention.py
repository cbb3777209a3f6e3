"""Distances between attention maps: one query row of each head is a distribution over keys.

Maps hold probabilities, exactly 0 at keys the query cannot see (padding, the future, outside a
window); both models' heads were brought to one count before (`llm_distill.heads`).
"""

import torch
from torch import Tensor

from llm_distill.losses.softmax import wide

__all__ = ["map_kl", "map_mse"]

TINY = 1e-30
"""Below it a probability counts as this: the logarithm stays finite."""


def map_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over keys, mean over heads: `[N, H, T], [N, H, T] -> [N]`, nats.

    Source: Wang et al. 2020 (MiniLM), arXiv 2002.10957, equation 5 (there summed over rows).

    >>> map_kl(torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]]))
    tensor([0.6931])
    """
    p, q = wide(teacher), wide(student)
    # Half the time of xlogy, and the same: where p is 0 the product is.
    return (p * (torch.log(p.clamp_min(TINY)) - torch.log(q.clamp_min(TINY)))).sum(-1).mean(-1)


def map_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error summed over keys, mean over heads: `[N, H, T], [N, H, T] -> [N]`.

    The sum over keys keeps the value independent of the length the batch is padded to.

    Source: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, equation 7 (there on scores before the
    softmax, which are only defined up to a constant; here on probabilities).

    >>> map_mse(torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]]))
    tensor([0.5000])
    """
    return (wide(student) - wide(teacher)).square().sum(-1).mean(-1)
