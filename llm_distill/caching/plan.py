"""Which examples go into which shard, from the data alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset as TorchStream
from transformers import TrainingArguments

from llm_distill import binding, hints, naming
from llm_distill.cache import frames, shards
from llm_distill.cache.layers import Layers
from llm_distill.capture import plain
from llm_distill.errors import InputError
from llm_distill.placement import dtype_of
from llm_distill.preparation import Run, readable
from llm_distill.teachers import Cached, Local

if TYPE_CHECKING:
    from llm_distill.cache.estimator import Estimator
    from llm_distill.cache.frames import Frame
    from llm_distill.naming import Named
    from llm_distill.objectives import Objective
    from llm_distill.teachers import Teacher

SHARD_BYTES = 64 << 20
"""Of a shard, about: what a killed run loses at most, for each rank."""

SHARD_ROWS = 1024
"""Supervised rows of a shard at least, where no hidden states are kept."""


def loads_in(teacher: Teacher) -> torch.dtype:
    """Dtype of a teacher's weights once it is loaded, which is not always its checkpoint's."""
    if not isinstance(teacher, Local):
        return torch.float32
    if not isinstance(teacher.model, str):
        return plain(teacher.model).dtype
    return dtype_of(teacher.config, teacher.asked_dtype or "auto")


@dataclass(frozen=True)
class Part:
    """One shard before it is written.

    Attributes:
        split: `train`, `eval`, or `eval[name]`.
        number: Of all shards.
        places: Of its examples in the split.
    """

    split: str
    number: int
    places: Sequence[int]

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.split.partition('[')[0]}-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Capture:
    """A cache that is to be written.

    Attributes:
        run: Student, teacher and data, prepared as for a training on the teacher itself.
        cached: Where to, and what is kept.
        args: Batch size, device, rank.
        shard_rows: Supervised rows of a shard; None: as many as make it some 64 MiB.
        maps: Layer maps that were decided, as the manifest has them.
    """

    run: Run
    cached: Cached
    args: TrainingArguments
    shard_rows: int | None = None
    maps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def on_maps(
        self, objectives: Sequence[Objective], maps: Mapping[str, Mapping[str, Any]]
    ) -> Capture:
        """The same, its objectives on decided maps."""
        specs = self.run.student, self.run.teacher.spec
        terms = binding.bind(objectives, *specs, seed=self.args.seed)
        run = replace(self.run, objectives=tuple(objectives), terms=terms)
        made = replace(self, run=run, maps=maps)
        vars(made)["named"] = self.named  # the data are the same, and were read once
        return made

    @property
    def folder(self) -> Path:
        """Where to."""
        return Path(self.cached.path)

    @cached_property
    def estimator(self) -> Estimator:
        """What is kept."""
        return self.cached.estimator

    @cached_property
    def layers(self) -> Layers | None:
        """The hidden states of layers that are kept; None: none."""
        run, features = self.run, self.run.teacher.spec.width
        if not self.cached.states:
            return None
        asked = hints.layers_of(run.objectives, run.terms, (run.student, run.teacher.spec))
        width = self.cached.states_width or features
        return Layers(tuple(sorted(asked)), hints.rows_of(run.terms), features, width)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a shard."""
        return self.estimator.columns + (() if self.layers is None else self.layers.columns)

    @cached_property
    def frames(self) -> dict[int, Frame]:
        """What the states are measured from, as it lies in the folder."""
        found = {} if self.layers is None else frames.load(self.folder)
        return {layer: frame.to(self.args.device) for layer, frame in found.items()}

    @property
    def vocabulary(self) -> int:
        """Tokens of the targets: those of both models, unless the whole head is kept."""
        whole = self.run.teacher.spec.vocabulary
        if self.estimator.example() is None:
            return whole
        return min(whole, self.run.student.vocabulary)

    @cached_property
    def datasets(self) -> dict[str, Any]:
        """The splits.

        Raises:
            InputError: For a stream, or where there is nothing to write.
        """
        found: dict[str, Any] = {}
        for name in ("train", "eval"):
            given = self.run.kwargs.get(f"{name}_dataset")
            parts = given if isinstance(given, Mapping) else {"": given}
            for label, dataset in parts.items():
                if dataset is None:
                    continue
                if isinstance(dataset, TorchStream) or not isinstance(dataset, Sized):
                    raise InputError(
                        f"the {name} data is a stream, which a cache cannot be sure to see whole; "
                        "write data: {streaming: false}"
                    )
                found[f"{name}[{label}]" if label else name] = dataset
        if not found:
            raise InputError("there is no data to cache; give a train_dataset")
        return found

    @cached_property
    def named(self) -> dict[str, Named]:
        """All examples of each split by name."""
        read = partial(readable, args=self.args)
        return {
            name: naming.names_of(dataset, self.run.collator, read)
            for name, dataset in self.datasets.items()
        }

    @cached_property
    def row_bytes(self) -> float:
        """Bytes of a row, at most."""
        width = self.run.teacher.spec.width
        return self.estimator.row_bytes(self.vocabulary, width, loads_in(self.run.teacher).itemsize)

    def tokens(self, name: str) -> Sequence[int]:
        """Tokens of each example of a split whose states are kept."""
        split = self.named[name]
        if self.layers is None:
            return [0] * len(split.rows)
        return split.lengths if self.layers.rows == "valid" else split.rows

    def bytes(self, part: Part) -> float:
        """Bytes of a shard, at most."""
        tokens, rows = self.tokens(part.split), self.rows(part)
        each = 0.0 if self.layers is None else self.layers.token_bytes
        content = self.row_bytes * rows + each * sum(tokens[k] for k in part.places)
        return shards.most_bytes(len(self.columns), rows, len(part.places), content)

    @cached_property
    def parts(self) -> list[Part]:
        """All shards: each example with something to keep once, in the order of the data."""
        # States of all tokens may be many for few supervised ones, and a shard is held in memory.
        least = self.shard_rows or (SHARD_ROWS if self.layers is None else 0)
        full = 0 if self.shard_rows else SHARD_BYTES
        each = 0.0 if self.layers is None else self.layers.token_bytes
        seen: set[bytes] = set()
        made: list[Part] = []
        for name, split in self.named.items():
            places: list[int] = []
            rows, size = 0, 0.0
            counts = zip(split.keys, split.rows, self.tokens(name), strict=True)
            for place, (key, count, tokens) in enumerate(counts):
                if not (count or tokens) or key in seen:
                    continue
                seen.add(key)
                places.append(place)
                rows, size = rows + count, size + count * self.row_bytes + tokens * each
                if rows >= least and size >= full:
                    made.append(Part(name, len(made), places))
                    places, rows, size = [], 0, 0.0
            if places:
                made.append(Part(name, len(made), places))
        return made

    def rows(self, part: Part) -> int:
        """Supervised rows of a shard."""
        return sum(self.named[part.split].rows[place] for place in part.places)

    def data(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each split."""
        return {
            name: {
                **split.facts(),
                "keys": blake2b(b"".join(split.keys), digest_size=16).hexdigest(),
            }
            for name, split in self.named.items()
        }

    def note(self, part: Part) -> Path:
        """The file that says that a shard is whole."""
        return self.folder / f"{part.file}.json"

    def digest(self, part: Part) -> str:
        """Which examples a shard holds."""
        keys = self.named[part.split].keys
        return blake2b(b"".join(keys[place] for place in part.places), digest_size=16).hexdigest()

    def is_whole(self, part: Part) -> bool:
        """Whether a shard of these examples was written."""
        note, file = self.note(part), self.folder / part.file
        if not (note.is_file() and file.is_file()):
            return False
        told = json.loads(note.read_text(encoding="utf-8"))
        expected = self.digest(part), told["shard"]["bytes"]
        return (told["keys"], file.stat().st_size) == expected
