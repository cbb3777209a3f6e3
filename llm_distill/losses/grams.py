"""Gram matrices: how all items of a group lie to each other, whatever their width.

What every loss on relations starts from. A matrix is [N, N] in fp32 or better, so that its memory
does not depend on the width.
"""

import torch
from torch import Tensor

from llm_distill.losses.softmax import wide

__all__ = ["centred", "linear_gram", "u_centred"]

CLOSE = 1e-6
"""Distances smaller than this, relative to the vectors' lengths, are rounding: they count as 0."""
LEAST = 3
"""Rows below which U-centring divides by zero."""


def centred(vectors: Tensor) -> Tensor:
    """Minus their mean; 0, with gradient 0, where only rounding is left: `[N, D] -> [N, D]`.

    >>> centred(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    >>> centred(torch.full((3, 1), 0.1)).tolist()
    [[0.0], [0.0], [0.0]]
    """
    vectors = wide(vectors)
    mean = vectors.mean(0, keepdim=True)
    apart = vectors - mean
    with torch.no_grad():
        size = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        size = size + torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
        same = torch.linalg.vector_norm(apart, dim=-1, keepdim=True) <= CLOSE * size
    return torch.where(same, 0.0, apart)


def linear_gram(vectors: Tensor) -> Tensor:
    """Inner products of all pairs of rows, after centring the features: `[N, D] -> [N, N]`.

    Centring keeps the digits: products of vectors with a large common part lose theirs.

    >>> linear_gram(torch.tensor([[101.0], [103.0]]))
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    vectors = centred(vectors)
    return vectors @ vectors.mT


def u_centred(gram: Tensor) -> Tensor:
    """Centred without the diagonal, which becomes 0; rows and columns sum to 0: `[n, n] -> [n, n]`.

    The inner product of two such matrices over n (n - 3) estimates HSIC without bias, so that it is
    0 in expectation for independent features at every n. With the diagonal kept the estimate grows
    with width / n. Leading dimensions are kept: `[..., n, n]` works as well.

    Raises:
        ValueError: If n < 3.

    Source: Szekely and Rizzo 2014, arXiv 1310.2926, definition 2; as HSIC: Song et al. 2012
    (Journal of Machine Learning Research 13).

    >>> u_centred(torch.tensor([[9.0, 1, 0, 0], [1, 9, 0, 0], [0, 0, 9, 1], [0, 0, 1, 9]]))[0]
    tensor([ 0.0000,  0.6667, -0.3333, -0.3333])
    """
    n = gram.shape[-1]
    if n < LEAST:
        raise ValueError(f"u_centred: a Gram matrix of {n} rows; give {LEAST} or more")
    diagonal = torch.eye(n, dtype=torch.bool, device=gram.device)
    apart = torch.where(diagonal, 0.0, gram)
    rows = apart.sum(-1, keepdim=True) / (n - 2)
    columns = apart.sum(-2, keepdim=True) / (n - 2)
    total = apart.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return torch.where(diagonal, 0.0, apart - rows - columns + total)
