"""Several teachers of the same rows as one: their logits, combined a few rows at a time.

A `Blend` hears all of them on every row, a `Switch` one of them on each. Both hold hidden states
and heads, never `[N, V]` logits: the pass over the head makes the products of a chunk, and combines
them block by block at the temperature that a term asks for.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.softmax import FLOOR, log_softmax, wide

Mode = Literal["mixture", "logit_mean"]
"""The mean of the probabilities, or of the logits (the geometric mean, renormalised)."""

Confidence = Literal["label", "entropy"]
"""What the share of a teacher in a row goes by: its loss on the label, or how sure it is."""


@dataclass(frozen=True, eq=False)
class Made:
    """Products with a head's weight that are there: `[n, V]`, and what follows them."""

    product: Tensor
    finish: Finish


@dataclass(frozen=True, eq=False)
class Blend:
    """What several teachers say of the same N rows, as one distribution of each row.

    Formula: `mixture`: `T log sum_k w_k softmax(z_k / T)`, which divided by T is the mixture of the
    tempered teachers; `logit_mean`: `sum_k w_k z_k`, at any T.

    Attributes:
        parts: Of each teacher; all are cut to the tokens that all of them have, and renormalised.
        weights: Their shares, which sum to 1.
        mode: How they are combined.
        confidence: What shares are multiplied by in each row (`confident`); None: nothing.
    """

    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    mode: Mode = "mixture"
    confidence: Confidence | None = None

    def __len__(self) -> int:
        """Rows."""
        return length(self.parts[0])

    @property
    def vocabulary(self) -> int:
        """Tokens that all of them have."""
        return min(tokens(part) for part in self.parts)

    def to(self, dtype: torch.dtype) -> Blend:
        """Hidden states and heads in the dtype of the matrix products."""
        return replace(self, parts=tuple(_cast(part, dtype) for part in self.parts))

    def chunk(self, rows: slice) -> Blend:
        """Some rows, with the matrix products made."""
        return replace(self, parts=tuple(_made(part, rows) for part in self.parts))

    def rows(self, part: slice) -> Blend:
        """Some rows of a chunk."""
        return replace(self, parts=tuple(_taken(each, part) for each in self.parts))

    def logits(self, width: int, temperature: float, labels: Tensor) -> Tensor:
        """The combined logits of a chunk: `[n, width]`, fp32 or better.

        Args:
            width: The first tokens, over which each teacher is normalised before they are combined.
            temperature: That the caller will divide them by.
            labels: `[n]`.
        """
        said = [_logits(part, width, temperature, labels) for part in self.parts]
        shares: list[Tensor | float] = list(self.weights)
        if self.confidence is not None:
            plain = said
            if temperature != 1.0:
                plain = [_logits(part, width, 1.0, labels) for part in self.parts]
            shares = list(confident(plain, self.weights, labels, self.confidence).unbind())
        if self.mode == "logit_mean":
            return _mean(said, shares)
        return _mixed(said, shares, temperature)


@dataclass(frozen=True, eq=False)
class Switch:
    """What several teachers say, each of rows of its own.

    Attributes:
        parts: Of each teacher, its rows alone.
        places: Where they belong among all N rows, ascending, on the host.
    """

    parts: tuple[Part, ...]
    places: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Rows."""
        return sum(map(len, self.places))

    @property
    def vocabulary(self) -> int:
        """Tokens that all of them have."""
        return min(tokens(part) for part in self.parts)

    def to(self, dtype: torch.dtype) -> Switch:
        """Hidden states and heads in the dtype of the matrix products."""
        return replace(self, parts=tuple(_cast(part, dtype) for part in self.parts))

    def chunk(self, rows: slice) -> Switch:
        """Some rows, with the matrix products made."""
        return self._between(rows, made=True)

    def rows(self, part: slice) -> Switch:
        """Some rows of a chunk."""
        return self._between(part, made=False)

    def logits(self, width: int, temperature: float, labels: Tensor) -> Tensor:
        """The logits of a chunk, in its order: `[n, width]`, fp32 or better; as `Blend.logits`."""
        out: Tensor | None = None
        for part, places in zip(self.parts, self.places, strict=True):
            if not places:
                continue
            index = torch.tensor(places, device=labels.device)
            said = _logits(part, width, temperature, labels[index])
            out = said.new_empty(len(self), width) if out is None else out
            out[index] = said
        return labels.new_zeros(0, width, dtype=torch.float32) if out is None else out

    def _between(self, rows: slice, *, made: bool) -> Switch:
        """The rows of a slice of all of them."""
        parts, kept = [], []
        for part, places in zip(self.parts, self.places, strict=True):
            own = slice(bisect_left(places, rows.start), bisect_left(places, rows.stop))
            parts.append(_made(part, own) if made else _taken(part, own))
            kept.append(tuple(place - rows.start for place in places[own]))
        return Switch(tuple(parts), tuple(kept))


Combined = Blend | Switch

Part = Projection | Tensor | Made | Combined
"""Whole logits of one teacher: as hidden states and a head, ready made, or combined themselves."""


def confident(
    said: list[Tensor], weights: tuple[float, ...], labels: Tensor, by: Confidence
) -> Tensor:
    """Shares of K teachers in each row, which sum to 1: K times `[n, V] -> [K, n, 1]`.

    Formula: `w_k c_k`, normalised over the teachers, with `c_k = 1 - exp(L_k) / sum_j exp(L_j)` for
    `label`, where L_k is the cross-entropy of teacher k on the label, and `c_k = exp(-H_k)` for
    `entropy`, where H_k is its entropy. Equal weights under `label` are those of the paper.

    Args:
        said: Logits at temperature 1.
        weights: Of the teachers.
        labels: `[n]`.
        by: What they go by.

    Source: Zhang, Chen, Wang 2022 (CA-MKD), arXiv 2201.00007, equation of w_KD.

    >>> sure, unsure = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
    >>> confident([sure, unsure], (0.5, 0.5), torch.tensor([0]), "label").flatten()
    tensor([0.9000, 0.1000])
    """
    logs = [log_softmax(z) for z in said]
    start = logs[0].new_tensor(weights).log().clamp_min(FLOOR)[:, None, None]
    if by == "entropy":
        trust = torch.stack([(p.exp() * p).sum(-1, keepdim=True) for p in logs])
    else:
        losses = torch.stack([-p.gather(-1, labels[:, None]) for p in logs])
        others = torch.eye(len(logs), device=losses.device, dtype=torch.bool)[:, :, None, None]
        # log(sum_{j != k} exp L_j): 1 - softmax would lose the digits of a share near 0.
        trust = losses.expand(len(logs), *losses.shape).masked_fill(others, 2 * FLOOR).logsumexp(1)
    return (start + trust).softmax(0)


def length(part: Part) -> int:
    """Rows of a part."""
    return len(part.product) if isinstance(part, Made) else len(part)


def tokens(part: Part) -> int:
    """Columns of its logits."""
    if isinstance(part, Made):
        return part.product.shape[1]
    return part.shape[1] if isinstance(part, Tensor) else part.vocabulary


def _mean(said: list[Tensor], shares: list[Tensor | float]) -> Tensor:
    """Weighted mean of logits: `[n, V] -> [n, V]`."""
    total = torch.zeros_like(said[0])
    for z, share in zip(said, shares, strict=True):
        total += z.clamp_min(FLOOR) * share
    return total


def _mixed(said: list[Tensor], shares: list[Tensor | float], temperature: float) -> Tensor:
    """Weighted mean of tempered probabilities as logits: `[n, V] -> [n, V]`."""
    total: Tensor | None = None
    for z, share in zip(said, shares, strict=True):
        log = torch.as_tensor(share, dtype=z.dtype, device=z.device).log().clamp_min(FLOOR)
        own = log_softmax(z / temperature if temperature != 1.0 else z) + log
        total = own if total is None else torch.logaddexp(total, own)
    if total is None:
        raise ValueError("a blend of no teachers says nothing")
    return total if temperature == 1.0 else total * temperature


def _cast(part: Part, dtype: torch.dtype) -> Part:
    """A part for the products of a pass."""
    return part if isinstance(part, Tensor | Made) else part.to(dtype)


def _made(part: Part, rows: slice) -> Part:
    """Some rows of a part, its product made."""
    if isinstance(part, Projection):
        size = len(range(*rows.indices(len(part))))
        return Made(part.product(rows, part.features.new_empty(size, part.vocabulary)), part.finish)
    return part.chunk(rows) if isinstance(part, Blend | Switch) else _taken(part, rows)


def _taken(part: Part, rows: slice) -> Part:
    """Some rows of a part that is made."""
    if isinstance(part, Made):
        return Made(part.product[rows], part.finish)
    if isinstance(part, Projection):
        raise TypeError("the rows of a projection are made by chunks")
    return part[rows] if isinstance(part, Tensor) else part.rows(rows)


def _logits(part: Part, width: int, temperature: float, labels: Tensor) -> Tensor:
    """Finished logits of a part that is made: `[n, width]`."""
    if isinstance(part, Made):
        return part.finish(part.product[:, :width])
    if isinstance(part, Projection):
        raise TypeError("the logits of a projection are made by chunks")
    if isinstance(part, Tensor):
        return wide(part[:, :width])
    return part.logits(width, temperature, labels)
