"""What judges a race, and how long the training is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer

from llm_distill import Logits
from llm_distill.errors import InputError
from llm_distill.preparation import prepare_run
from llm_distill.race.examples import HELD_OUT, check_size, collator_copy, held_out, total_steps
from tests import tiny


class Places(Dataset[int]):
    """A torch dataset of numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        return place


class Stream(IterableDataset[int]):
    """A torch stream of numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def table(size: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(range(size))})


def numbers(part: Any) -> list[int]:
    """The examples in order."""
    found = iter(part) if not hasattr(part, "__len__") else (part[k] for k in range(len(part)))
    return [one["x"] if isinstance(one, dict) else one for one in found]


KINDS: dict[str, Callable[[int], Any]] = {
    "table": table,
    "list": lambda size: list(range(size)),
    "torch": Places,
    "stream": lambda size: table(size).to_iterable_dataset(),
    "torch stream": Stream,
}


class TestHeldOut:
    @pytest.mark.parametrize(("size", "kept"), [(10, 1), (57, 5), (640, HELD_OUT), (999, HELD_OUT)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_example_is_on_one_side(self, kind: str, size: int, kept: int) -> None:
        train, judges = held_out(KINDS[kind](size))
        last = range(size - kept, size) if "stream" not in kind else range(kept)
        assert numbers(judges) == list(last)
        assert numbers(train) == [x for x in range(size) if x not in last]
        assert numbers(judges) == list(last)  # a second time

    @pytest.mark.parametrize("kind", KINDS)
    def test_too_few(self, kind: str) -> None:
        with pytest.raises(InputError, match="a tenth of the training data out, and there are 9"):
            held_out(KINDS[kind](9))

    def test_what_is_known_early(self) -> None:
        with pytest.raises(InputError, match="there is no train_dataset to race on; give one"):
            check_size(None)
        with pytest.raises(InputError, match="there are 9 examples; give more, or write auto"):
            check_size(table(9))
        check_size(Stream(2))  # is read when the race starts


class TestTotalSteps:
    @pytest.mark.parametrize("drop", [False, True])
    @pytest.mark.parametrize("size", [8, 31, 32, 33, 70])
    @pytest.mark.parametrize(("accumulation", "epochs"), [(1, 1.0), (3, 1.5), (2, 3.0)])
    def test_as_trainer_counts(
        self, tmp_path: Path, size: int, accumulation: int, epochs: float, drop: bool
    ) -> None:
        args = tiny.arguments(
            tmp_path,
            max_steps=-1,
            num_train_epochs=epochs,
            gradient_accumulation_steps=accumulation,
            dataloader_drop_last=drop,
        )
        models = tiny.llama("student"), tiny.llama("teacher")
        run = prepare_run(*models, (Logits(),), args, {"train_dataset": tiny.rows(size)})
        trainer = Trainer(tiny.llama("student"), args, train_dataset=run.kwargs["train_dataset"])
        loader = cast("Any", trainer.get_train_dataloader())
        theirs = trainer.set_initial_training_values(args, loader)
        assert total_steps(run, args) == theirs[-1]

    def test_written(self, tmp_path: Path) -> None:
        args = tiny.arguments(tmp_path, max_steps=7)
        models = tiny.llama("student"), tiny.llama("teacher")
        run = prepare_run(*models, (Logits(),), args, {"train_dataset": tiny.rows(8)})
        assert total_steps(run, args) == 7

    def test_a_stream_has_no_length(self, tmp_path: Path) -> None:
        models = tiny.llama("student"), tiny.llama("teacher")
        data = {"train_dataset": tiny.rows(8).to_iterable_dataset()}
        args = tiny.arguments(tmp_path, max_steps=-1)
        run = prepare_run(*models, (Logits(),), args, data)
        with pytest.raises(InputError, match="a stream has no known length; write max_steps"):
            total_steps(run, args)


class TestCollatorCopy:
    def test_a_state_of_its_own(self) -> None:
        class Drawing:
            def __init__(self) -> None:
                self.generator = torch.Generator().manual_seed(3)

            def __call__(self, rows: Any) -> Any:
                return rows, torch.rand(2, generator=self.generator)

        collator = Drawing()
        first = collator_copy(collator)([])[1]
        assert torch.equal(first, collator_copy(collator)([])[1])
        assert torch.equal(first, collator([])[1])

    def test_one_that_cannot_be_copied_is_shared(self) -> None:
        class Held:
            def __deepcopy__(self, memo: Any) -> Any:
                raise TypeError("cannot pickle a lock")

        collator = Held()
        assert collator_copy(collator) is collator
