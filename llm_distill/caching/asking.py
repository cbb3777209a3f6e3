"""One shard: the teacher is asked about its examples, and what it says is written."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from llm_distill.binding import make_batch
from llm_distill.cache import fingerprints
from llm_distill.cache.encoded import Encoded, Fidelity
from llm_distill.cache.estimator import Given
from llm_distill.cache.layers import Lost
from llm_distill.cache.manifest import Shard
from llm_distill.cache.shards import ShardWriter
from llm_distill.errors import InputError
from llm_distill.preparation import readable
from llm_distill.signals import Dense, Factored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from llm_distill.cache.layers import Layers
    from llm_distill.caching.plan import Capture, Part
    from llm_distill.rows import Batch
    from llm_distill.signals import Signals, Whole
    from llm_distill.teachers import Source


@dataclass
class Measured:
    """What was measured of a shard.

    Attributes:
        fidelity: Of its targets.
        lost: Of its hidden states, by layer.
    """

    fidelity: Fidelity = field(default_factory=Fidelity)
    lost: dict[int, Lost] = field(default_factory=dict)

    def written(self) -> dict[str, Any]:
        """As a note has it."""
        return {
            "fidelity": asdict(self.fidelity),
            "lost": {str(layer): asdict(lost) for layer, lost in self.lost.items()},
        }


def write_shard(
    capture: Capture, part: Part, source: Source, tick: Callable[[int], object]
) -> Shard:
    """Ask about the examples of a shard, and write it: whole, or not at all.

    Args:
        capture: All of them.
        part: This one.
        source: The teacher.
        tick: Told of the rows that are done, as they are.

    Raises:
        InputError: If the disk is full.
    """
    path = capture.folder / part.file
    begun = path.with_suffix(".part")
    try:
        shard, measured = _write(capture, part, source, begun, tick)
        begun.replace(path)
        note = {"shard": asdict(shard), "keys": capture.digest(part), **measured.written()}
        _write_note(capture.note(part), note)
    except OSError as error:
        begun.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise InputError(
            f"the disk of {capture.folder} is full; whole shards stay: make room and run the same "
            "command again, which goes on"
        ) from error
    return shard


def _write(
    capture: Capture, part: Part, source: Source, path: Path, tick: Callable[[int], object]
) -> tuple[Shard, Measured]:
    """The file, and what is in it."""
    found, measured = _encoded(capture, part, source, tick)
    keys = capture.named[part.split].keys
    about = {"llm_distill": f"{capture.run.teacher.spec.kind}, {capture.estimator}"}
    with ShardWriter(path, capture.columns, about) as writer:
        for place in part.places:
            writer.add(keys[place], found[place])
    shard = Shard(
        file=part.file,
        split=part.split,
        examples=len(part.places),
        rows=writer.rows,
        bytes=path.stat().st_size,
        sha256=fingerprints.of_file(path),
    )
    return shard, measured


@torch.no_grad()
def _encoded(
    capture: Capture, part: Part, source: Source, tick: Callable[[int], object]
) -> tuple[dict[int, Encoded], Measured]:
    """What is kept of each example by its place, those of one length asked together."""
    split = capture.named[part.split]
    order = sorted(part.places, key=lambda place: -split.lengths[place])
    size = capture.args.eval_batch_size
    found, measured = {}, Measured()
    for start in range(0, len(order), size):
        places = order[start : start + size]
        batch = batch_of(capture, part.split, places)
        said = source(batch.for_teacher)
        every = _examples(capture, part, places, batch, said.whole)
        states = states_of(capture, batch, said)
        for place, given, own in zip(places, every, states, strict=True):
            kept, told = _kept(capture, place, given)
            measured.fidelity += told
            if capture.layers is not None:
                kept = _beside(kept, place, own, capture, measured)
            found[place] = kept
            tick(told.rows)
    return found, measured


def _kept(capture: Capture, place: int, given: Given) -> tuple[Encoded, Fidelity]:
    """The targets of an example, and how near they are.

    Raises:
        InputError: If what the teacher said is no finite numbers.
    """
    try:
        return capture.estimator.encode(given)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"example {place}: {error}; leave it out, or load the teacher in another dtype: of: "
            "{Local: {model: …, dtype: float32}}"
        ) from error


def _beside(
    kept: Encoded, place: int, states: Mapping[int, Tensor], capture: Capture, measured: Measured
) -> Encoded:
    """The targets of an example with its hidden states.

    Raises:
        InputError: If these are no finite numbers.
    """
    layers = cast("Layers", capture.layers)
    try:
        columns, lost = layers.encode(states, capture.frames)
    except ValueError as error:
        raise InputError(f"example {place}: {error}; leave it out, or states: false") from error
    measured.lost = {k: measured.lost.get(k, Lost()) + each for k, each in lost.items()}
    return replace(kept, columns={**kept.columns, **columns})


def batch_of(capture: Capture, split: str, places: Sequence[int]) -> Batch:
    """Some examples of a split, on the device of the teacher."""
    dataset, collator = capture.datasets[split], capture.run.collator
    every = capture.layers is not None and capture.layers.rows == "valid"
    with torch.random.fork_rng(devices=[]):  # collators may draw
        examples = [readable(dataset[place], capture.args) for place in places]
        collated = replace(collator, valid=collator.valid or every)(examples)
    batch = make_batch(collated, None, seed=capture.args.seed, epoch=0)
    return batch.to(capture.args.device)


def states_of(capture: Capture, batch: Batch, said: Signals) -> Iterator[dict[int, Tensor]]:
    """The kept hidden states of each example: layer -> `[M, D]`."""
    kept = capture.layers
    if kept is None:
        yield from ({} for _ in batch.supervised.per_sequence)
        return
    rows = batch.rows(kept.rows)
    parts = [said.hidden(layer, rows).split(rows.per_sequence) for layer in kept.layers]
    for own in zip(*parts, strict=True):
        yield dict(zip(kept.layers, own, strict=True))


def _examples(
    capture: Capture, part: Part, places: Sequence[int], batch: Batch, said: Whole
) -> Iterator[Given]:
    """What the teacher said of each example.

    Raises:
        InputError: If the collator makes something else of an example each time.
    """
    split, start = capture.named[part.split], 0
    for place, rows in zip(places, batch.supervised.per_sequence, strict=True):
        if rows != split.rows[place]:
            raise InputError(
                f"example {place} of the {part.split} data has {rows} supervised tokens now and "
                f"{split.rows[place]} before: the data_collator draws; a cache needs the same "
                "examples each time"
            )
        own = slice(start, start + rows)
        seed = int.from_bytes(split.keys[place][:7], "big")
        yield Given(_some(said, own), batch.supervised.labels[own], capture.vocabulary, seed)
        start += rows


def _some(said: Whole, rows: slice) -> Whole:
    """Some rows of a distribution."""
    if isinstance(said, Factored):
        return Factored(said.hidden[rows], said.head)
    return Dense(said.values[rows])


def _write_note(path: Path, content: Mapping[str, object]) -> None:
    """A small file, whole or not there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)
