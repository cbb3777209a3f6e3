"""`load` and `prepare`: the whole way from a spec, or from rows, to tokenised examples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from llm_distill.data.encoder import Encoder, StreamEncoder, count
from llm_distill.data.files import is_local
from llm_distill.data.formats import nothing_supervised, open_encoder, used_columns
from llm_distill.data.report import Counter, Counts, Prepared, Report
from llm_distill.data.source import explained, read
from llm_distill.data.spec import Data, fraction_of_stream
from llm_distill.errors import InputError

AnyDataset: TypeAlias = Dataset | IterableDataset

_CHECKED = 1000  # Examples of a stream that are looked at before training.
_STREAM_BATCH = 64  # Rows tokenised at once: a stream should begin soon.
_EXAMPLE = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
_COUNTED = {"truncated": Value("int8"), "supervised": Value("int32")}


def load(data: Data, tokenizer: PreTrainedTokenizerBase, *, max_positions: int | None) -> Prepared:
    """Read and tokenise the data of a recipe.

    Args:
        data: What to read.
        tokenizer: The student's tokenizer.
        max_positions: The positions of the model that has fewer; None if there is no limit.

    Raises:
        InputError: If the data is missing, unreadable, in no accepted format or of no use.
    """
    held_out = data.eval if isinstance(data.eval, float) else None
    length = _length(data, max_positions)
    train = replace(data, eval=held_out)
    prepared = prepare(
        read(train, tokenizer, length), train, tokenizer, max_positions=max_positions
    )
    if not isinstance(data.eval, str):
        return prepared
    other = _evaluation(data, data.eval)
    try:
        rows = read(other, tokenizer, length)
        evaluation = prepare(rows, other, tokenizer, max_positions=max_positions)
    except InputError as error:
        raise InputError(f"data.eval: {error}") from error
    return replace(prepared, eval=evaluation.train, eval_report=evaluation.report)


def prepare(
    dataset: AnyDataset,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int | None = None,
) -> Prepared:
    """Tokenise a dataset that is there already; a stream stays a stream.

    Args:
        dataset: Rows in an accepted format.
        data: How to tokenise them. Its path and split are not used.
        tokenizer: The student's tokenizer.
        max_positions: The positions of the model that has fewer; None if there is no limit.

    Raises:
        InputError: If the rows are in no accepted format or of no use.
    """
    if isinstance(data.eval, str):
        raise InputError(
            f"data.eval: '{data.eval}' cannot be found from a dataset in memory; give the "
            "evaluation data as a dataset too, or a fraction"
        )
    length = _length(data, max_positions)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, data, tokenizer, length)
    if isinstance(dataset, Dataset):
        return _prepare_table(dataset, data, tokenizer, length)
    raise InputError(
        f"the data is a {type(dataset).__name__}, not a datasets.Dataset or IterableDataset; give "
        "one split, such as dataset['train'], or make one with datasets.Dataset.from_list(rows)"
    )


def _length(data: Data, max_positions: int | None) -> int | None:
    if data.max_length is None or max_positions is None or data.max_length <= max_positions:
        return data.max_length or max_positions
    raise InputError(
        f"data.max_length: {data.max_length} tokens are more than the {max_positions} positions "
        f"of the models; write max_length: {max_positions} or less"
    )


def _evaluation(data: Data, where: str) -> Data:
    """A bare word is a split; a path has a slash or a suffix."""
    if "/" not in where and not Path(where).suffix:
        return replace(data, split=where, eval=None)
    split = "train" if is_local(where) else data.split
    return replace(data, path=where, name=None, revision=None, split=split, eval=None)


def _prepare_table(
    dataset: Dataset, data: Data, tokenizer: PreTrainedTokenizerBase, length: int | None
) -> Prepared:
    if not len(dataset):
        raise InputError(f"{data.where} holds no examples")
    plain = dataset.with_format(None)
    if data.limit is not None:
        plain = plain.select(range(min(data.limit, len(plain))))
    encoder = open_encoder(plain[0], data, tokenizer, length)
    used = used_columns(encoder, plain.column_names)
    kept_features = _kept(data, plain.column_names, plain.features)
    table = plain.select_columns(list(dict.fromkeys([*used, *data.keep]))).map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=[column for column in used if column not in data.keep],
        features=Features(_EXAMPLE | _COUNTED | kept_features),
        num_proc=data.num_proc,
        desc="Tokenising",
    )
    kept, report = _useful(table, encoder, data.keep)
    if data.eval is None:
        return Prepared(train=kept, eval=None, report=report)
    return _hold_out(kept, report, float(data.eval), data)


def _kept(data: Data, columns: Sequence[str], features: Features | None) -> dict[str, object]:
    """The columns that stay, with their types; text where nobody knows them.

    Raises:
        InputError: For one that is not there.
    """
    for column in (column for column in data.keep if column not in columns):
        raise InputError(
            f"{data.where} has no column '{column}', which is to be kept; it has "
            f"{', '.join(columns)}"
        )
    return {
        column: Value("string") if features is None else features[column] for column in data.keep
    }


def _useful(table: Dataset, encoder: Encoder, keep: Sequence[str]) -> tuple[Dataset, Report]:
    """Leave out the examples that teach nothing; count from columns, which a cache has too."""
    supervised = table.data.column("supervised").to_numpy()
    places = np.flatnonzero(supervised)
    kept = table if len(places) == len(table) else table.select(places)
    lengths = pc.list_value_length(table.data.column("input_ids")).to_numpy()
    counts = Counts(
        examples=len(table),
        truncated=int(table.data.column("truncated").to_numpy().sum(dtype=np.int64)),
        dropped=len(table) - len(places),
        tokens=int(lengths[places].sum(dtype=np.int64)),
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
    )
    _check(counts, encoder, f"the {counts.examples:,} examples")
    report = Report(**counts._asdict(), max_length=encoder.max_length)
    return kept.select_columns([*_EXAMPLE, *keep]), report


def _hold_out(kept: Dataset, report: Report, fraction: float, data: Data) -> Prepared:
    held = max(1, round(fraction * len(kept)))
    if held >= len(kept):
        raise InputError(
            f"data.eval: {fraction} of {len(kept)} examples leaves nothing to train on; give more "
            "data, or evaluate on a split or a path"
        )
    parts = kept.train_test_split(test_size=held, seed=data.shuffle_seed)
    return Prepared(train=parts["train"], eval=parts["test"], report=replace(report, held_out=held))


def _prepare_stream(
    dataset: IterableDataset, data: Data, tokenizer: PreTrainedTokenizerBase, length: int | None
) -> Prepared:
    if data.eval is not None:
        raise InputError(fraction_of_stream(float(data.eval)))
    stream = dataset.with_format(None)
    if data.limit is not None:
        stream = stream.take(data.limit)
    with explained(data):
        first = list(stream.take(_CHECKED))
    if not first:
        raise InputError(f"{data.where} holds no examples")
    encoder = open_encoder(first[0], data, tokenizer, length)
    used = used_columns(encoder, list(first[0]))
    kept_features = _kept(data, list(first[0]), None)
    encoded = encoder({name: [row.get(name) for row in first] for name in used}, range(len(first)))
    counts = count(encoded)
    _check(counts, encoder, f"the first {counts.examples:,} examples of the stream")
    counter = Counter(length)
    read_columns = list(dict.fromkeys([*used, *data.keep]))
    train = stream.select_columns(read_columns).map(
        StreamEncoder(encoder=encoder, counter=counter, keep=data.keep),
        batched=True,
        batch_size=_STREAM_BATCH,
        with_indices=True,
        remove_columns=read_columns,
        features=Features(_EXAMPLE | kept_features),
    )
    report = Report(**counts._asdict(), max_length=length, stream=True)
    return Prepared(train=train, eval=None, report=report, counter=counter)


def _check(counts: Counts, encoder: Encoder, which: str) -> None:
    if not counts.supervised_tokens:
        raise InputError(
            f"0 supervised tokens in {which} of {encoder.where} ({counts.truncated:,} truncated): "
            f"{nothing_supervised(encoder)}"
        )
