"""The data of a race: training examples without some that judge it, and how long a training is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, Subset

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from llm_distill.preparation import Run

HELD_OUT = 64
"""Examples of the training data that judge a race, at most; a tenth of them where that is less."""


class Part(IterableDataset[Any]):
    """Some examples of a stream that has no way to skip.

    Args:
        stream: Iterated anew each time.
        start: Examples that are left out.
        stop: Where it ends; None: with the stream.
    """

    def __init__(self, stream: Any, start: int, stop: int | None) -> None:  # noqa: ANN401  any stream
        super().__init__()
        self._stream, self._start, self._stop = stream, start, stop

    def __iter__(self) -> Iterator[Any]:
        """Its examples."""
        return islice(iter(self._stream), self._start, self._stop)


def held_out(dataset: Any) -> tuple[Any, Any]:  # noqa: ANN401  any dataset
    """Training data without some examples, and those: the last, or the first of a stream.

    Raises:
        InputError: If there are too few to part with any.
    """
    if not isinstance(dataset, Sized):
        kept = _tenth(sum(1 for _ in islice(iter(dataset), 10 * HELD_OUT)))
        if hasattr(dataset, "skip"):  # of the datasets library: its state can be saved
            return dataset.skip(kept), dataset.take(kept)
        return Part(dataset, kept, None), Part(dataset, 0, kept)
    size = len(dataset)
    first = size - _tenth(size)
    return _part(dataset, range(first)), _part(dataset, range(first, size))


def check_size(dataset: Any) -> None:  # noqa: ANN401  any dataset
    """Refuse training data that are missing or, where that is known, too few.

    Raises:
        InputError: Saying how many there are.
    """
    if dataset is None:
        raise InputError("auto_race: there is no train_dataset to race on; give one, or write auto")
    if isinstance(dataset, Sized):
        _tenth(len(dataset))


def _tenth(size: int) -> int:
    """How many examples are held out."""
    if size < 10:
        raise InputError(
            f"auto_race holds a tenth of the training data out, and there are {size} examples; "
            "give more, or write auto"
        )
    return min(HELD_OUT, size // 10)


def _part(dataset: Any, places: range) -> Any:  # noqa: ANN401  any dataset
    """Some examples."""
    return dataset.select(places) if hasattr(dataset, "select") else Subset(dataset, places)


def total_steps(run: Run, args: TrainingArguments) -> int:
    """Optimizer steps of the training.

    Raises:
        InputError: For a stream without `max_steps`.
    """
    if args.max_steps > 0:
        return args.max_steps
    dataset: Any = run.kwargs.get("train_dataset")
    if not isinstance(dataset, Sized):
        raise InputError("auto_race: a stream has no known length; write max_steps")
    batches = len(dataset) / (args.train_batch_size * args.world_size)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    updates = max(math.ceil(whole / args.gradient_accumulation_steps), 1)
    steps: int = math.ceil(updates * args.num_train_epochs)
    return steps


def collator_copy(collator: Any) -> Any:  # noqa: ANN401  any collator
    """A collator with a state of its own, so that it draws the same in every training.

    One that cannot be copied is shared.
    """
    try:
        return copy.deepcopy(collator)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return collator
