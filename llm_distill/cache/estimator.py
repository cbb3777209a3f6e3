"""What every kind of target is: made of a teacher's rows, read back, and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from llm_distill.cache import columns
from llm_distill.cache.encoded import Encoded, Fidelity
from llm_distill.errors import InputError
from llm_distill.losses.softmax import log_softmax
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.signals import Factored, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.signals import Distribution, Head

Told = TopK | Counts | Tensor
"""Targets as a process makes them that has no head: sparse ones, or hidden states."""

CHUNK = 256
"""Rows whose logits exist at a time."""


@dataclass(frozen=True)
class Given:
    """What a teacher said of one example.

    Attributes:
        said: Its whole logits.
        labels: `[N]`.
        vocabulary: Tokens that count: those of both models.
        seed: What its draws follow from.
    """

    said: Whole
    labels: Tensor
    vocabulary: int
    seed: int

    def rows(self) -> list[slice]:
        """The chunks, one of nothing where there are no rows."""
        count = len(self.said)
        return [slice(k, min(k + CHUNK, count)) for k in range(0, max(count, 1), CHUNK)]

    def logits(self, rows: slice) -> Tensor:
        """Logits of a chunk: `[n, V]`.

        Raises:
            ValueError: For a row that is no distribution: NaN, +inf, or nothing above -inf.
        """
        found = self.said.logits(rows)[:, : self.vocabulary]
        if not found.amax(-1).isfinite().all():
            raise ValueError("the logits of the teacher are not finite")
        return found


class Estimator(ABC):
    """What is kept of the teacher's distributions. Frozen; its fields are in the manifest.

    Attributes:
        name: As a recipe writes it.
        columns: Of bytes, in the order of the file.
    """

    name: ClassVar[str]
    columns: tuple[str, ...]

    @abstractmethod
    def __str__(self) -> str:
        """In words."""

    @abstractmethod
    def encode(self, given: Given) -> tuple[Encoded, Fidelity]:
        """The targets of an example, and how near they are once read back."""

    @abstractmethod
    def tensors(self, found: Sequence[Encoded], dtype: torch.dtype) -> Told:
        """The targets of examples, row after row, on the CPU: hidden states without the head.

        Args:
            found: In their order; none for targets of no rows.
            dtype: Of hidden states.
        """

    def decode(self, found: Sequence[Encoded], head: Head | None) -> Distribution:
        """The targets of examples, row after row.

        Args:
            found: In their order; none for targets of no rows.
            head: The teacher's, where its logits are made of hidden states.
        """
        dtype = torch.float32 if head is None else head.weight.dtype
        return distribution(self.tensors(found, dtype), head)

    def example(self) -> Distribution | None:
        """Targets of no rows, to ask which terms they serve; None where they serve any."""
        return self.decode([], None)

    @abstractmethod
    def row_bytes(self, vocabulary: int, width: int, itemsize: int) -> float:
        """Bytes of a row on disk, to reserve room: what no teacher's rows exceed.

        Args:
            vocabulary: Tokens of the targets.
            width: Of the hidden states.
            itemsize: Of their numbers.
        """

    @abstractmethod
    def check(self, vocabulary: int) -> None:
        """Refuse settings that do not fit a vocabulary.

        Raises:
            InputError: Saying what would.
        """


def distribution(told: Told, head: Head | None) -> Distribution:
    """What was told, with the teacher's head where it is hidden states.

    Raises:
        RuntimeError: If there is no head.
    """
    if not isinstance(told, Tensor):
        return told
    if head is None:
        raise RuntimeError("hidden states were kept without a head")
    return Factored(told.reshape(len(told), head.weight.shape[1]), head)


def facts(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label, and entropy: `[n, V], [n] -> [2, n]`, nats."""
    log_p = log_softmax(logits)
    # A label of the teacher's padding, which the student has not, has no probability.
    known = labels.clamp_max(logits.shape[1] - 1)
    label = log_p.gather(-1, known[:, None])[:, 0].masked_fill(labels != known, -torch.inf)
    return torch.stack([label, -(log_p.exp() * log_p).sum(-1)])


def half(facts: Tensor) -> columns.Bytes:
    """Facts as bytes of fp16."""
    return columns.as_bytes(facts.half().cpu().numpy())


def fidelity(
    facts: Tensor, exact: TopK | None = None, read: TopK | None = None, *, mass: float = 0.0
) -> Fidelity:
    """Sums over the rows of an example."""
    kl, worst = 0.0, 0.0
    if exact is not None and read is not None:
        order = exact.ids.argsort(-1)
        sorted_ids = TopK(
            exact.ids.gather(-1, order), exact.log_probs.gather(-1, order), exact.tail
        )
        told, back = sorted_ids.targets().double().cpu(), read.targets().double()
        lost = (told.exp() * (told - back)).sum(-1)
        kl, worst = float(lost.sum()), float(lost.amax()) if len(lost) else 0.0
        mass = float((1.0 - exact.tail.double().exp()).sum())
    label, entropy = facts.double().sum(1).tolist()
    return Fidelity(facts.shape[1], kl, worst, mass, entropy, -label)


def generator(given: Given) -> torch.Generator:
    """Random numbers of one example, whatever batch it is in."""
    device = given.labels.device
    return torch.Generator(device).manual_seed(given.seed)


def check_count(what: str, count: object, least: int, most: int, such: str) -> None:
    """Refuse what is no whole number, or one out of its range."""
    whole = isinstance(count, int) and not isinstance(count, bool)
    if not (whole and least <= cast("int", count) <= most):
        raise InputError(
            f"keep: {what} is {count!r}; write a number from {least} to {most}, such as {such}"
        )
