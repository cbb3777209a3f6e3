"""What a run has to be so that a cached teacher can serve it, checked before the first step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from rich.progress import track
from torch.utils.data import IterableDataset as TorchStream

from llm_distill import binding, mapping
from llm_distill.cache import fingerprints
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.keys import example_key
from llm_distill.losses.planning import plan
from llm_distill.losses.sparse import TopK
from llm_distill.objectives import HeadTerm, Logits
from llm_distill.rows import IGNORED
from llm_distill.teachers import Cached
from llm_distill.teachers.cached_source import refuse_layers
from llm_distill.vocabulary import find_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_distill.cache.estimator import Estimator
    from llm_distill.collation import RowCollator
    from llm_distill.objectives import Objective, Term
    from llm_distill.signals import ModelSpec

PIECE = 1000
"""Examples that are read from a table at a time."""

MANY = 20_000
"""Examples from which naming them shows a bar."""


@dataclasses.dataclass(frozen=True)
class Named:
    """The examples of one split.

    Attributes:
        keys: In their order.
        rows: Supervised rows of each.
        lengths: Tokens of each.
    """

    keys: Sequence[bytes]
    rows: Sequence[int]
    lengths: Sequence[int]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {
            "examples": len(self.keys),
            "rows": sum(self.rows),
            "longest": max(self.lengths, default=0),
        }


def looks_up(teacher: object) -> bool:
    """Whether a teacher is a cache, or made of teachers of which one is."""
    if isinstance(teacher, Cached):
        return True
    parts: Sequence[object] = ()
    if isinstance(teacher, Mapping):
        parts = tuple(teacher.values())
    elif isinstance(teacher, tuple | list):
        parts = teacher
    elif dataclasses.is_dataclass(teacher):
        parts = tuple(vars(teacher)[field.name] for field in dataclasses.fields(teacher))
    return any(looks_up(part) for part in parts)


def check_objectives(
    estimator: Estimator,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    student: ModelSpec,
    teacher: ModelSpec,
    held: Collection[int] = (),
) -> None:
    """Refuse what a cache cannot serve.

    Args:
        estimator: What a cache keeps.
        objectives: What is trained.
        terms: The same, bound.
        student: Of the run.
        teacher: Whose answers they are.
        held: Its layers whose hidden states are kept.

    Raises:
        InputError: Naming the objective and what to write.
    """
    example = estimator.example()
    for objective, (name, term) in zip(objectives, terms.items(), strict=True):
        asked = term.teacher | mapping.requests([objective], student, teacher)[1]
        try:
            asked = asked | binding.survey([objective], student, teacher)[1]
            refuse_layers(asked, name, estimator, held)
        except ValueError as error:
            raise InputError(str(error)) from error
        if example is None or not (isinstance(term, HeadTerm) and term.teacher.logits):
            continue
        try:
            plan([term.row], student.vocabulary, example)
        except ValueError as error:
            raise InputError(
                f"{name}: the cache keeps {estimator}; {error}; or cache with keep: topk, or "
                "keep: hidden"
            ) from error


def check(
    teacher: object,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    student: ModelSpec,
) -> None:
    """Refuse objectives that a cache cannot serve; any other teacher may pass.

    Raises:
        InputError: Naming the objective or the signal, and what to write.
    """
    if not isinstance(teacher, Cached):
        return
    manifest = teacher.store.manifest
    held = () if manifest.layers is None else manifest.layers.layers
    check_objectives(manifest.estimator, objectives, terms, student, teacher.spec, held)
    if manifest.estimator.example() is not None and student.vocabulary < manifest.vocabulary:
        raise InputError(
            f"the cache {teacher.path} was written for students of {manifest.vocabulary} tokens "
            f"and more, and {student.name} has {student.vocabulary}; write it anew with this recipe"
        )


def told(teacher: object, objectives: Sequence[Objective]) -> tuple[str, ...]:
    """What a cache is, for the lines before a training; nothing for any other teacher."""
    if not isinstance(teacher, Cached):
        return ()
    said = [f"teacher: the cache {teacher.path} of {teacher.store.manifest}"]
    kept = teacher.store.manifest.estimator
    warm = [o for o in objectives if isinstance(o, Logits) and o.temperature != 1]
    if warm and isinstance(kept.example(), TopK):
        said.append(
            f"temperature {warm[0].temperature:g} on {kept}: the tail is tempered as one token, "
            "which is an approximation; keep: hidden is exact"
        )
    return tuple(said)


def check_data(
    teacher: object,
    tokenizer: PreTrainedTokenizerBase | None,
    datasets: Mapping[str, Any],
    collator: RowCollator,
    read: Callable[[Any], Any],
) -> None:
    """Refuse files, tokenizers and examples that are not those of the cache.

    A stream, and data of a cache inside another teacher, are looked up batch by batch alone.

    Args:
        teacher: Any; only a cache is looked at.
        tokenizer: Of the run.
        datasets: By the names of Trainer's arguments.
        collator: Of the run.
        read: Takes away the columns that Trainer does.

    Raises:
        InputError: Saying what differs.
    """
    if not isinstance(teacher, Cached):
        return
    teacher.check_files()
    if tokenizer is not None:
        _check_tokenizer(teacher, tokenizer)
    for name, dataset in datasets.items():
        parts = dataset if isinstance(dataset, Mapping) else {name: dataset}
        for part, content in parts.items():
            if isinstance(content, Sized) and not isinstance(content, TorchStream):
                label = name if part == name else f"{name}[{part}]"
                _check_examples(teacher, label, names_of(content, collator, read))


def names_of(dataset: Any, collator: RowCollator, read: Callable[[Any], Any]) -> Named:  # noqa: ANN401  what Trainer takes
    """All examples of a dataset by name; from its columns where nothing else decides."""
    plain = isinstance(dataset, Dataset) and set(dataset.column_names) <= {"input_ids", "labels"}
    if plain and isinstance(collator.collator, Collator):
        found = _from_columns(dataset, shift=collator.shift)
    else:
        found = _from_batches(dataset, collator, read)
    shown = len(dataset) >= MANY and os.environ.get("RANK", "0") == "0"
    bar = track(found, "looking at the data", total=len(dataset), transient=True, disable=not shown)
    keys, rows, lengths = [], [], []
    for key, count, length in bar:
        keys.append(key)
        rows.append(count)
        lengths.append(length)
    return Named(keys, rows, lengths)


def _from_columns(dataset: Dataset, *, shift: bool) -> Iterator[tuple[bytes, int, int]]:
    """Key, supervised rows and tokens of each example, some microseconds for one."""
    table = dataset.with_format("arrow")
    labelled = "labels" in dataset.column_names
    for start in range(0, len(dataset), PIECE):
        part = table[start : start + PIECE]
        ids = part["input_ids"].combine_chunks()
        tokens = ids.flatten().to_numpy()
        labels = part["labels"].combine_chunks().flatten().to_numpy() if labelled else tokens
        end = 0
        for length in ids.value_lengths().to_pylist():
            begin, end = end, end + length
            marked = np.flatnonzero(labels[begin + shift : end] != IGNORED)
            yield example_key(tokens[begin:end], marked), len(marked), length


def _from_batches(
    dataset: Any,  # noqa: ANN401  what Trainer takes
    collator: RowCollator,
    read: Callable[[Any], Any],
) -> Iterator[tuple[bytes, int, int]]:
    """The same by collating each example alone, which any dataset and collator can."""
    naming = dataclasses.replace(collator, named=True, lookup=None)
    for place in range(len(dataset)):
        with torch.random.fork_rng(devices=[]):
            batch = naming([read(dataset[place])])
        found = batch["examples"]
        mask = batch.get("attention_mask")
        length = batch["input_ids"].shape[1] if mask is None else int((mask != 0).sum())
        yield found.keys[0], found.rows[0], length


def _check_tokenizer(teacher: Cached, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse another tokenizer or chat template than those that cut the cached examples."""
    manifest = teacher.store.manifest
    if manifest.tokenizer and fingerprints.of_tokenizer(tokenizer) != manifest.tokenizer:
        theirs = teacher.find_tokenizer()
        told = ""
        if theirs is not None:
            told = find_difference(tokenizer, theirs, ("of this run", f"of {manifest.teacher}"))
        raise InputError(
            f"the cache {teacher.path} was written with another tokenizer"
            + (f": {told}" if told else ", which cuts text otherwise")
            + "; take that of the cache, or write the cache anew"
        )
    if manifest.tokenizer and fingerprints.of_template(tokenizer) != manifest.template:
        raise InputError(
            f"the cache {teacher.path} was written with another chat template than the tokenizer's "
            "of this run; take the tokenizer of the cache, or write the cache anew"
        )


def _check_examples(teacher: Cached, name: str, found: Named) -> None:
    """Refuse examples that are not in the cache, with what differs."""
    kept = teacher.store.manifest.layers
    counts = found.lengths if kept is not None and kept.rows == "valid" else found.rows
    wanted = [k for k, count in enumerate(counts) if count]
    held = teacher.store.index.holds([found.keys[k] for k in wanted])
    missing = [k for k, there in zip(wanted, held.tolist(), strict=True) if not there]
    if not missing:
        return
    first, facts = missing[0], found.facts()
    known = teacher.store.manifest.data
    split = name.replace("_dataset", "")
    if split not in known:
        raise InputError(
            f"the cache {teacher.path} holds no {split} data ({', '.join(known)} alone); write it "
            "anew with this recipe"
        )
    words = {
        "examples": "{} examples",
        "rows": "{} supervised tokens",
        "longest": "at most {} long",
    }
    differ = [
        f"{text.format(f'{facts[key]:,}')} now, {known[split][key]:,} there"
        for key, text in words.items()
        if facts[key] != known[split][key]
    ]
    told = "; ".join(differ) or "there are as many, and as long ones, in the cache"
    raise InputError(
        f"{name}: {len(missing):,} of {len(wanted):,} examples are not in the cache "
        f"{teacher.path}, the first is number {first} ({found.lengths[first]} tokens, "
        f"{found.rows[first]} supervised); {told}. The data, their order in blocks, the chat "
        "template or max_length changed: write them as they were, or the cache anew"
    )
