"""What a benchmark is made of: arms, the right answers, and what the columns mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from scripts.bench.measure import Run

if TYPE_CHECKING:
    from scripts.bench.settings import Settings

Kind = Literal["floor", "part", "ours", "dense", "rival"]

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""Relative error of loss and gradients above which an arm computes something else."""


class UnavailableError(Exception):
    """An arm cannot run here; the message goes into the table."""


@dataclass(frozen=True)
class Arm:
    """One way to do the work.

    Attributes:
        name: In the table.
        kind: Floors and parts have no loss; only rivals may fail.
        make: Prepares the work, and returns what is timed.
        note: What a reader has to know to judge the number.
        answer: Which right answer it has to give; None: nothing to compare.
        memory: Whether its peak says anything.
        twice: Its peak is that of the second run, as the first one compiles.
        returned: MiB of gradients it gives back, where that is less than all.
    """

    name: str
    kind: Kind
    make: Callable[[], Run]
    note: str = ""
    answer: str | None = None
    memory: bool = True
    twice: bool = False
    returned: float | None = None


@dataclass(frozen=True)
class Answer:
    """A loss and its gradients, by their names."""

    loss: float
    gradients: Mapping[str, Tensor]


class Benchmark(ABC):
    """Inputs, arms and right answers of one benchmark.

    Attributes:
        settings: What was asked for.
        title: Of the table.
        ratios: Columns of ratios: name -> arms whose times are summed in the denominator.
        lean: The arm whose peak the others are compared with; None: no such column.
    """

    settings: Settings
    title: str
    ratios: Mapping[str, Sequence[str]]
    lean: str | None = None

    @abstractmethod
    def arms(self) -> list[Arm]:
        """All arms, in the order of the table."""

    @abstractmethod
    def forget(self) -> None:
        """Drop all gradients."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last run, those that there are."""

    @abstractmethod
    def answer(self, name: str) -> Answer:
        """What an arm should have given."""

    @abstractmethod
    def facts(self) -> dict[str, float]:
        """Sizes: `gradients_mib`, and where there are logits `logits_mib` (one fp32 [N, V])."""


def errors(loss: Tensor | None, gradients: Mapping[str, Tensor], right: Answer) -> dict[str, float]:
    """Relative errors of the loss and of each gradient that there is.

    >>> import torch
    >>> g = torch.tensor([3.0, 4.0])
    >>> errors(torch.tensor(2.0), {"weight": g}, Answer(2.0, {"weight": g, "bias": g}))
    {'loss': 0.0, 'weight': 0.0}
    """
    found = {}
    if loss is not None:
        found["loss"] = abs(float(loss.detach()) - right.loss) / abs(right.loss)
    for name, gradient in gradients.items():
        expected = right.gradients[name]
        difference = (gradient.to(expected.dtype) - expected).norm()
        found[name] = float(difference / expected.norm())
    return found
