"""What is kept of one example, as bytes, and what that was worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoded:
    """The targets of one example.

    Attributes:
        rows: Supervised rows, N.
        width: Numbers of each row in the columns whose width differs between examples; 0 where none
            does.
        columns: Their bytes by name, row after row.
    """

    rows: int
    width: int
    columns: Mapping[str, NDArray[np.uint8]]

    def table(self, name: str, width: int) -> NDArray[np.uint8]:
        """A column as `[N, width]`."""
        return self.columns[name].reshape(self.rows, width)

    def halves(self, name: str, count: int) -> NDArray[np.float16]:
        """A column as `count` numbers of fp16 for each row: `[count, N]`."""
        return self.columns[name].view(np.float16).reshape(count, self.rows)


@dataclass(frozen=True)
class Fidelity:
    """How near the targets are to the teacher, as sums over rows.

    Attributes:
        rows: Supervised rows.
        kl: Nats between what an estimator keeps exactly and what is read back.
        worst: The largest of these.
        mass: Probability of the kept tokens.
        entropy: Of the teacher, nats.
        nll: Of the labels under the teacher, nats.
    """

    rows: int = 0
    kl: float = 0.0
    worst: float = 0.0
    mass: float = 0.0
    entropy: float = 0.0
    nll: float = 0.0

    def __add__(self, other: Fidelity) -> Fidelity:
        """Both together.

        >>> (Fidelity(2, kl=1.0, worst=0.7) + Fidelity(1, kl=0.5, worst=0.5)).means()["kl"]
        0.5
        """
        total = {f.name: vars(self)[f.name] + vars(other)[f.name] for f in fields(self)}
        return Fidelity(**{**total, "worst": max(self.worst, other.worst)})

    def means(self) -> dict[str, float]:
        """Per row; the largest stays the largest."""
        rows = max(self.rows, 1)
        per_row = {name: vars(self)[name] / rows for name in ("kl", "mass", "entropy", "nll")}
        return {**per_row, "worst": self.worst}
