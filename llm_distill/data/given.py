"""Datasets that are in memory already, as Trainer takes them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import PreTrainedTokenizerBase

from llm_distill.data.pipeline import prepare
from llm_distill.data.report import Prepared
from llm_distill.data.spec import Data
from llm_distill.errors import InputError


def first_of(dataset: object, most: int) -> Iterator[Any]:
    """The first examples of a dataset that has places; none of a stream, which would lose them."""
    if isinstance(dataset, TorchStream) or not isinstance(
        dataset, Dataset | TorchDataset | Sequence
    ):
        return iter(())
    there = len(dataset) if isinstance(dataset, Sized) else 1
    return (dataset[place] for place in range(min(most, there)))


def head(dataset: Iterable[Any], most: int) -> Iterator[Any]:
    """The first examples of any dataset; by their places where it has some and knows how many.

    Iteration over a torch `Dataset` ends at the first IndexError, which not every one raises.
    """
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        places = cast("Sequence[Any]", dataset)
        return (places[place] for place in range(min(most, len(places))))
    return islice(iter(dataset), most)


def tokenised(
    dataset: Any,  # noqa: ANN401  whatever Trainer takes
    tokenizer: PreTrainedTokenizerBase | None,
    positions: int | None,
    seen: dict[str, Prepared],
    name: str,
    *,
    keep_tokens: bool = False,
    keep: Sequence[str] = (),
) -> Any:  # noqa: ANN401  what it was given
    """`input_ids` and `labels` of a `datasets` object; anything else as it is.

    Args:
        dataset: One, or several under names.
        tokenizer: The student's.
        positions: Tokens that a sequence may have.
        seen: What became of the rows is added here, under the name.
        name: For messages.
        keep: Columns that stay beside the tokens.
        keep_tokens: Rows that have tokens stay as they are, for a collator of the user's own.

    Raises:
        InputError: If it is empty, in no accepted format, or needs a tokenizer that is not known.
    """
    if isinstance(dataset, Mapping):
        return {
            key: tokenised(
                part,
                tokenizer,
                positions,
                seen,
                f"{name}[{key}]",
                keep_tokens=keep_tokens,
                keep=keep,
            )
            for key, part in dataset.items()
        }
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise InputError(f"{name} is empty")
    has_tokens = "input_ids" in _columns(dataset)
    if not isinstance(dataset, Dataset | IterableDataset) or (keep_tokens and has_tokens):
        return dataset
    if tokenizer is None and not has_tokens:
        raise InputError(
            f"{name} has the columns {dataset.column_names} and no tokenizer is known; give "
            "processing_class=tokenizer"
        )
    if "position_ids" in _columns(dataset):
        raise InputError(
            f"{name} has position_ids, as packed sequences do, which the default collator does not "
            "keep; where all rows are of one length, give "
            "data_collator=transformers.default_data_collator; else give one example in each row, "
            "without position_ids, and data_collator=DataCollatorWithFlattening(), which packs them"
        )
    known = cast("PreTrainedTokenizerBase", tokenizer)  # not read for rows that are tokens already
    seen[name] = prepare(
        dataset, Data(max_length=None, keep=tuple(keep)), known, max_positions=positions
    )
    return seen[name].train


def _columns(dataset: object) -> Sequence[str]:
    """The columns of a `datasets` object, where it knows them."""
    known = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
    return known or ()
