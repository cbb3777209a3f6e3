"""Sparse targets of several teachers: the tokens of one are not the other's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_distill.losses.sparse import Counts, TopK

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Several:
    """Sparse targets of several teachers on the same rows: the tokens of one are not the other's.

    A divergence is the weighted sum of its values on each. Under forward KL that has the gradient
    of their mixture.

    Attributes:
        parts: Of each teacher.
        weights: Of the teachers, which sum to 1.
    """

    parts: tuple[TopK | Counts, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, targets: Sequence[Sparse], weights: Sequence[float]) -> Several:
        """Targets that may be several themselves."""
        parts: list[TopK | Counts] = []
        shares: list[float] = []
        for target, weight in zip(targets, weights, strict=True):
            inner = target.weights if isinstance(target, Several) else (1.0,)
            parts += each(target)
            shares += [weight * share for share in inner]
        return cls(tuple(parts), tuple(shares))

    def __len__(self) -> int:
        """Rows."""
        return len(self.parts[0])

    def rows(self, part: slice) -> Several:
        """Some of the rows; nothing is copied."""
        return Several(tuple(own.rows(part) for own in self.parts), self.weights)


Sparse = TopK | Counts | Several
"""A few tokens of each row, of one teacher or of several."""


def each(target: Sparse) -> tuple[TopK | Counts, ...]:
    """The targets of single teachers."""
    return target.parts if isinstance(target, Several) else (target,)
