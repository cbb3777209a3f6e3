"""Distances between the relations of items: how like, far and turned they lie to each other.

Nothing here compares a student's vector with a teacher's, only pairs of items of one model with the
same pairs of the other. So widths may differ without a projector, and pooled items may come from
two tokenizers. A group of items goes in; the mean over its rows is the published loss. Groups too
small to have relations read 0 with a gradient of 0.

Memory grows with the square of the group: `llm_distill.losses.needs` says how many rows to take.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.features import bent, check_delta
from llm_distill.losses.grams import CLOSE, centred, linear_gram, u_centred
from llm_distill.losses.groups import is_small, silent
from llm_distill.losses.softmax import FLOOR, wide

__all__ = ["cka", "pkt", "rkd_angle", "rkd_distance", "unbiased_cka"]

TINY = 1e-6
"""Affinities in [0, 1] below this are rounding of fp32: they count as this, without a gradient."""
AT_ONCE = 2**20
"""Angles in memory at a time."""


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between the two models' neighbourhoods of each item: `[N, D], [N, D'] -> [N]`, nats.

    Formula, for row i: `sum_{j != i} p_ij log(p_ij / q_ij)`, where p_ij (teacher) and q_ij
    (student) are `(cos(x_i, x_j) + 1) / 2` divided by their sum over j != i, of centred items.

    It departs from the published code in three ways. Items are centred first: hidden states of
    language models share a direction, beside which all affinities look equal. The diagonal is left
    out, as in the paper. Rows are summed, not averaged over all N^2 pairs, so that the value does
    not shrink with the group and one weight serves all sizes.

    Items that equal the mean in either model have no direction: they are nobody's neighbours, and
    their row reads 0. So do groups of fewer than 3, where there is one neighbour or none.

    Raises:
        ValueError: If the two models have different numbers of rows.

    Source: Passalis and Tefas 2018 (PKT), arXiv 1803.10837, section 3, with the cosine kernel.

    >>> items = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    >>> pkt(2 * items.flip(-1) + 5, items)  # mirrored, scaled and moved
    tensor([0., 0., 0.])
    """
    if is_small("pkt", student, teacher, least=3):
        return silent(student)
    ours, theirs = centred(student), centred(teacher)
    there = _lengths(ours).gt(0) & _lengths(theirs).gt(0)
    near = there & there[:, None] & ~_diagonal(len(there), there.device)
    # A softmax of log-affinities is the affinities over their sum; FLOOR is the logit of nothing.
    return forward_kl(
        torch.where(near, _log_affinity(ours), FLOOR),
        torch.where(near, _log_affinity(theirs), FLOOR),
    )


def rkd_distance(student: Tensor, teacher: Tensor, *, delta: float = 1.0) -> Tensor:
    """Huber between the distances of items, each over its mean: `[N, D], [N, D'] -> [N]`.

    Row i is the mean over j != i of `Huber(|s_i - s_j| / m_s - |t_i - t_j| / m_t)`, m the mean
    distance of all pairs. Equal items are at distance 0, which has the gradient 0. The published
    code averages over N^2 pairs, with the diagonal: (N - 1) / N of this. Groups of fewer than 3
    items, whose distances always equal their mean, read 0.

    Args:
        student: Items.
        teacher: Items.
        delta: Difference at which the square ends, in mean distances.

    Raises:
        ValueError: If delta is not above 0, or the two models have different numbers of rows.

    Source: Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.1.

    >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> rkd_distance(student, teacher).mean()
    tensor(0.0208)
    """
    check_delta("rkd_distance", delta)
    if is_small("rkd_distance", student, teacher, least=3):
        return silent(student)
    ours, theirs = (_over_their_mean(_distances(_exact_gram(x))) for x in (student, teacher))
    errors = bent(ours - theirs, delta)
    return (errors.sum(-1) / (len(student) - 1)).to(wide(student).dtype)


def rkd_angle(student: Tensor, teacher: Tensor, *, delta: float = 1.0) -> Tensor:
    """Huber between the cosines of the angles at each item: `[N, D], [N, D'] -> [N]`.

    Row i is the mean over j != k, both other than i, of the Huber distance of the two models'
    `cos(x_j - x_i, x_k - x_i)`. Angles at or to equal items, in either model, count as alike. The
    published code averages over N^3 triples, of which those that repeat an item are no angles:
    (N - 1) (N - 2) / N^2 of this. Groups of fewer than 3 items read 0.

    There are N^3 angles. They are computed some vertices at a time, and again in the backward pass,
    so that about `AT_ONCE` are in memory.

    Args:
        student: Items.
        teacher: Items.
        delta: Difference at which the square ends, in cosines.

    Raises:
        ValueError: If delta is not above 0, or the two models have different numbers of rows.

    Source: Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.2.

    >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> rkd_angle(student, teacher).mean()
    tensor(0.0583)
    """
    check_delta("rkd_angle", delta)
    if is_small("rkd_angle", student, teacher, least=3):
        return silent(student)
    n, corners = len(student), (*_corners(student), *_corners(teacher))
    step = max(1, AT_ONCE // n**2)
    parts: list[Tensor] = [
        checkpoint(
            _angle_errors,
            *corners,
            vertices=slice(start, start + step),
            delta=delta,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, n, step)
    ]
    return (torch.cat(parts) / ((n - 1) * (n - 2))).to(wide(student).dtype)


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus unbiased linear CKA, split over items: `[N, D], [N, D'] -> [N]`.

    With U the U-centred Gram matrix of a model divided by its norm, row i is
    `N / 2 |Us_i - Ut_i|^2`: never negative, 0 in each row for equal models, and `1 - <Us, Ut>` in
    the mean. That mean is in [0, 2]: the estimate is 0 on average for independent features, and so
    below 0 for some. A group without any structure (all items equal) is at 1/2 from every other
    and at 0 from another such group, without a gradient. Groups of fewer than 4 items read 0.

    Raises:
        ValueError: If the two models have different numbers of rows.

    Source: Kornblith et al. 2019 (CKA), arXiv 1905.00414, section 3, with the unbiased estimate of
    Nguyen et al. 2020, arXiv 2010.15327.

    >>> items = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0], [3.0, 0.0]])
    >>> cka(2 * items.flip(-1) + 5, items).mean()  # mirrored, scaled and moved
    tensor(0.)
    """
    if is_small("cka", student, teacher, least=4):
        return silent(student)
    return 0.5 * len(student) * (_structure(student) - _structure(teacher)).square().sum(-1)


def unbiased_cka(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased linear CKA of two models' features of the same items: `[N, D], [N, D'] -> []`.

    1 for features equal up to rotation, scale and shift, 0 on average for independent ones at every
    N and width (the biased one reads 0.9 there at N = 64, D = 768), and 0 where all items of a
    model are equal.

    Raises:
        ValueError: If there are fewer than 4 items, or not the same number of both.

    Source: Nguyen et al. 2020, arXiv 2010.15327, for one batch.

    >>> items = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0], [3.0, 0.0]])
    >>> unbiased_cka(items, 2 * items.flip(-1) + 5)
    tensor(1.)
    """
    if is_small("unbiased_cka", x, y, least=4):
        raise ValueError(f"unbiased_cka: {len(x)} rows say nothing; give 4 or more")
    return (_structure(x) * _structure(y)).sum()


def _diagonal(n: int, device: torch.device) -> Tensor:
    """True where a row meets itself: `[n, n]`."""
    return torch.eye(n, dtype=torch.bool, device=device)


def _lengths(vectors: Tensor) -> Tensor:
    """Lengths of the rows: `[N, D] -> [N]`."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def _log_affinity(items: Tensor) -> Tensor:
    """Log of (cos + 1) / 2 for all pairs of centred items: `[N, D] -> [N, N]`."""
    lengths = _lengths(items)
    directions = items / torch.where(lengths > 0, lengths, 1.0)[:, None]
    return ((directions @ directions.mT + 1) / 2).clamp_min(TINY).log()


def _exact_gram(items: Tensor) -> Tensor:
    """Gram matrix in float64, from which also small distances can be read: `[N, D] -> [N, N]`."""
    items = centred(items)
    if items.device.type != "mps":  # which has no float64
        items = items.double()
    return items @ items.mT


def _distances(gram: Tensor) -> Tensor:
    """Distances of all pairs; 0, with gradient 0, for equal ones: `[N, N] -> [N, N]`."""
    sizes = gram.diagonal() + gram.diagonal()[:, None]
    squares = sizes - 2 * gram
    apart = squares > max(CLOSE**2, 16 * torch.finfo(gram.dtype).eps) * sizes
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


def _over_their_mean(distances: Tensor) -> Tensor:
    """Divided by their mean over distinct items, where it is not 0: `[N, N] -> [N, N]`."""
    n = len(distances)
    mean = distances.sum() / (n * (n - 1))
    return distances / torch.where(mean > 0, mean, 1.0)


def _corners(items: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix, and one over each distance (0 for equal items): `[N, D] -> 2 x [N, N]`."""
    gram = _exact_gram(items)
    distances = _distances(gram)
    apart = distances > 0
    return gram, torch.where(apart, 1 / torch.where(apart, distances, 1.0), 0.0)


def _angle_errors(
    gram: Tensor, near: Tensor, other: Tensor, other_near: Tensor, *, vertices: slice, delta: float
) -> Tensor:
    """Sums over pairs of the Huber distances of the cosines at some vertices: `-> [vertices]`."""
    known = (near[vertices] > 0) & (other_near[vertices] > 0)
    angles = known[:, :, None] & known[:, None, :] & ~_diagonal(len(gram), gram.device)
    errors = _cosines(gram, near, vertices) - _cosines(other, other_near, vertices)
    return torch.where(angles, bent(errors, delta), 0.0).sum((-2, -1))


def _cosines(gram: Tensor, near: Tensor, vertices: slice) -> Tensor:
    """Cosine of the angle at i between j and k, from inner products: `-> [vertices, N, N]`."""
    own, here, scale = gram.diagonal()[vertices], gram[vertices], near[vertices]
    products = gram - here[:, :, None] - here[:, None, :] + own[:, None, None]
    return products * scale[:, :, None] * scale[:, None, :]


def _structure(items: Tensor) -> Tensor:
    """U-centred Gram matrix of norm 1, or 0 where only rounding is left: `[N, D] -> [N, N]`."""
    gram = linear_gram(items)
    matrix = u_centred(gram)
    norm = torch.linalg.matrix_norm(matrix)
    found = norm > 10 * CLOSE * torch.linalg.matrix_norm(gram)
    return torch.where(found, matrix / torch.where(found, norm, 1.0), 0.0)
