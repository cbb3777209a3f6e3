"""What became of the rows: `Report`, the `Counter` of a stream, and `Prepared`, which has both."""

from dataclasses import dataclass
from typing import NamedTuple

import datasets
import torch
from torch.utils.data import get_worker_info

_WORKERS = 256  # A slot for each worker of a DataLoader, so that no two write to the same place.


class Counts(NamedTuple):
    """What a `Report` counts; see there."""

    examples: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Counts of examples and tokens; `str` makes a sentence of them.

    Args:
        examples: Examples read, the dropped ones included.
        truncated: Examples cut at `max_length`, some of which may have been dropped for it.
        dropped: Examples left out: empty, or nothing in them supervised.
        tokens: Tokens of the examples that were kept.
        supervised_tokens: Those of them that are predicted; the first of an example never is.
        max_length: Where examples were cut, in tokens.
        held_out: Examples of these that were set aside for evaluation.
        stream: Whether this is a part of a stream, so that more may follow.
    """

    examples: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    max_length: int | None
    held_out: int = 0
    stream: bool = False

    def __str__(self) -> str:
        """Say it in one line."""
        read = f"{_many(self.examples, 'example')}{' of a stream' if self.stream else ''}"
        at = f" at {self.max_length:,} tokens" if self.max_length is not None else ""
        held = f", {self.held_out:,} held out for evaluation" if self.held_out else ""
        return (
            f"{read}: {self.truncated:,} truncated{at}, "
            f"{self.dropped:,} dropped (empty, or nothing supervised){held}; "
            f"{_many(self.tokens, 'token')}, {self.supervised_tokens:,} of them supervised"
        )


class Counter:
    """Counts what a stream has delivered so far, in every epoch and every DataLoader worker."""

    def __init__(self, max_length: int | None) -> None:
        """Start at zero.

        Args:
            max_length: Where examples are cut, in tokens; for the report.
        """
        self._max_length = max_length
        # Shared memory: a worker is another process, and its counts must be seen in this one.
        self._counts = torch.zeros(_WORKERS, len(Counts._fields), dtype=torch.int64).share_memory_()

    def add(self, counts: Counts) -> None:
        """Add the counts of a batch."""
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % (_WORKERS - 1)
        self._counts[slot] += torch.tensor(counts)

    def reset(self) -> None:
        """Back to zero: what calibration read is no part of a training."""
        self._counts.zero_()

    def report(self) -> Report:
        """The counts up to now."""
        counts = Counts(*self._counts.sum(0).tolist())
        return Report(**counts._asdict(), max_length=self._max_length, stream=True)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Datasets with the columns ``input_ids`` and ``labels``, and what was found on the way.

    Args:
        train: The training examples.
        eval: The evaluation examples.
        report: What became of the training rows. For a stream: of its first 1,000.
        eval_report: The same for an evaluation split or path of its own. None where there is no
            evaluation, or where it is a fraction: `report` counts both then.
        counter: What the training stream has delivered so far. None where it is no stream.
    """

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | datasets.IterableDataset | None
    report: Report
    eval_report: Report | None = None
    counter: Counter | None = None


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
