"""How similar layers are: linear CKA without bias, from disjoint sets of tokens.

Plain linear CKA of independent features is far from 0 (0.90 at 64 tokens of width 768); with
U-centred Gram matrices it is 0 in expectation at every number of tokens. One token that is a
hundred times longer than the rest makes independent layers look alike, whatever the estimator:
`keep` finds such tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_distill.losses.grams import linear_gram, u_centred

LONGEST = 6.0
"""Norm over the median norm of its layer beyond which a token is a sink or an outlier."""

FEWEST_SETS = 4
"""Disjoint sets below which a spread says nothing about the error."""

FEWEST_ROWS = 4
"""Tokens of a set below which the unbiased estimate does not exist: it divides by n (n - 3)."""


@dataclass(frozen=True, eq=False)
class Similarity:
    """Unbiased CKA of layers with layers; the index is the layer number, 0 the embedding.

    Attributes:
        values: `[rows + 1, columns + 1]`, at most 1; 0 in expectation for independent features.
        errors: Standard errors, the same shape.
    """

    values: Tensor
    errors: Tensor


def keep(states: Sequence[Tensor]) -> Tensor:
    """Which tokens are no sinks or outliers in any layer: L x `[n, D_l]` -> bool `[n]`.

    Args:
        states: The same n tokens in every layer, of both models where both are compared: a token
            that is out of line in one model distorts what the two have in common.

    Raises:
        ValueError: If there is no layer.

    Source: Davari et al. 2022, arXiv 2210.16156 (a few outliers move CKA at will); the threshold is
    ours.

    >>> keep([torch.tensor([[1.0], [2.0], [-3.0], [100.0]]), torch.ones(4, 2)])
    tensor([ True,  True,  True, False])
    """
    if not states:
        raise ValueError("layers: no hidden states were given; give those of at least one layer")
    kept = torch.ones(len(states[0]), dtype=torch.bool, device=states[0].device)
    for layer in states:
        norms = torch.linalg.vector_norm(layer.float(), dim=-1)
        kept &= norms <= LONGEST * norms.nanmedian()  # False for NaN as well
    return kept


def normed(features: Tensor) -> Tensor:
    """U-centred Gram matrix of Frobenius norm 1, or 0 for constant features: `[n, D] -> [n, n]`.

    The inner product of two such matrices is the unbiased CKA of the features.

    Raises:
        ValueError: If n < 4.

    Source: Szekely and Rizzo 2014, arXiv 1310.2926; as CKA: Nguyen et al. 2020, arXiv 2010.15327.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0], [3.0, 1.0], [0.5, 2.0]])
    >>> float((normed(x) * normed(3 * x + 1)).sum().round(decimals=4))
    1.0
    """
    return _unit(features)[0]


class Similarities:
    """Gathers disjoint sets of tokens; keeps numbers per pair of layers, never states.

    While a set is added there is one matrix [n, n] per layer, whatever the width.

    Source: Nguyen, Raghu, Kornblith 2020, arXiv 2010.15327 (numerators and denominators
    are averaged over the sets, then divided).

    >>> sets = Similarities()
    >>> for seed in range(4):
    ...     x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    ...     sets.add([x, 2 * x])
    >>> sets.result()["similarity"].values
    tensor([[1., 1.],
            [1., 1.]])
    """

    def __init__(self) -> None:
        self._teacher: list[Tensor] = []
        self._cross: list[Tensor] = []
        self._student: list[Tensor] = []
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        """Sets so far."""
        return len(self._teacher)

    @torch.no_grad()
    def add(self, teacher: Sequence[Tensor], student: Sequence[Tensor] | None = None) -> None:
        """Add a set: L x `[n, D_l]` of the teacher and, in all sets or in none, of the student.

        Raises:
            ValueError: If the numbers of tokens differ, or are below 4, or the layers are not those
                of the sets before.
        """
        student = student or []
        self._check(teacher, student)
        self._device = teacher[0].device
        n = len(teacher[0])
        theirs = _scaled([_unit(layer) for layer in teacher], n)
        self._teacher.append(_products(theirs, theirs))
        if student:
            ours = _scaled([_unit(layer) for layer in student], n)
            self._cross.append(_products(ours, theirs))
            self._student.append(_products(ours, ours).diagonal().clone())

    def result(self) -> dict[str, Similarity]:
        """`similarity` of teacher with teacher and, where a student was added, `cross` with it.

        Standard errors are those of the jackknife over the sets (each left out once).

        Returns:
            Matrices in fp32 on the device of the states; nothing for fewer than 4 sets.
        """
        if len(self) < FEWEST_SETS:
            return {}
        teacher = torch.stack(self._teacher)
        of_teacher = teacher.diagonal(dim1=1, dim2=2)
        found = {"similarity": self._similarity(teacher, of_teacher, of_teacher)}
        if self._cross:
            cross, of_student = torch.stack(self._cross), torch.stack(self._student)
            found["cross"] = self._similarity(cross, of_student, of_teacher)
        return found

    def _similarity(self, products: Tensor, rows: Tensor, columns: Tensor) -> Similarity:
        """Ratio of sums and its jackknife: `[k, R, C], [k, R], [k, C]`."""
        values = _ratio(products.sum(0), rows.sum(0), columns.sum(0))
        k = len(products)
        without = _ratio(products.sum(0) - products, rows.sum(0) - rows, columns.sum(0) - columns)
        errors = ((k - 1) / k * (without - without.mean(0)).square().sum(0)).sqrt()
        return Similarity(
            values.to(self._device, torch.float32), errors.to(self._device, torch.float32)
        )

    def _check(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
        """Refuse a set that does not go with the others."""
        lengths = {len(layer) for layer in (*teacher, *student)}
        if len(lengths) != 1 or min(lengths) < FEWEST_ROWS:
            raise ValueError(
                f"layers: a set has {sorted(lengths)} tokens; all layers need the same ones, at "
                f"least {FEWEST_ROWS}"
            )
        if not self._teacher:
            return
        before = (len(self._teacher[0]), len(self._student[0]) if self._student else 0)
        if (len(teacher), len(student)) != before:
            raise ValueError(
                f"layers: a set has {len(teacher)} teacher and {len(student)} student layers, "
                f"those before it {before[0]} and {before[1]}"
            )


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """U-centred Gram matrix of norm 1, or 0, and the norm it had: `[n, D] -> [n, n], []`."""
    if len(features) < FEWEST_ROWS:
        raise ValueError(
            f"layers: {len(features)} tokens are too few for unbiased CKA; give at least "
            f"{FEWEST_ROWS}"
        )
    gram = u_centred(linear_gram(features))
    norm = torch.linalg.vector_norm(gram)
    return gram / norm.where(norm > 0, 1.0), norm


def _scaled(grams: Sequence[tuple[Tensor, Tensor]], n: int) -> tuple[Tensor, Tensor]:
    """Matrices in rows and their lengths, so that products are HSIC: `[L, n n], [L]`."""
    flat = torch.stack([gram.flatten() for gram, _ in grams])
    norms = torch.stack([norm for _, norm in grams]).to("cpu", torch.float64)
    return flat, norms / (n * (n - 3)) ** 0.5


def _products(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """HSIC of all pairs of layers in float64 on the CPU: `[R, C]`."""
    cosines = (rows[0] @ columns[0].mT).to("cpu", torch.float64)
    return cosines * rows[1][:, None] * columns[1]


def _ratio(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """CKA from sums of HSIC; 0 where a layer is constant: `[..., R, C]`."""
    size = (rows.clamp_min(0)[..., :, None] * columns.clamp_min(0)[..., None, :]).sqrt()
    return torch.where(size > 0, products / size.where(size > 0, 1.0), 0.0)
