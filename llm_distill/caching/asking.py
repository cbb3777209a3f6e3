"""One shard: the teacher is asked about its examples, and what it says is written."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from llm_distill.binding import make_batch
from llm_distill.cache import fingerprints
from llm_distill.cache.encoded import Encoded, Fidelity
from llm_distill.cache.estimator import Given
from llm_distill.cache.manifest import Shard
from llm_distill.cache.shards import ShardWriter
from llm_distill.errors import InputError
from llm_distill.preparation import readable
from llm_distill.signals import Dense, Factored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from llm_distill.caching.plan import Capture, Part
    from llm_distill.rows import Batch
    from llm_distill.signals import Whole
    from llm_distill.teachers import Source


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
        shard, fidelity = _write(capture, part, source, begun, tick)
        begun.replace(path)
        note = {"shard": asdict(shard), "fidelity": asdict(fidelity), "keys": capture.digest(part)}
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
) -> tuple[Shard, Fidelity]:
    """The file, and what is in it."""
    found, fidelity = _encoded(capture, part, source, tick)
    keys = capture.named[part.split].keys
    about = {"llm_distill": f"{capture.run.teacher.spec.kind}, {capture.estimator}"}
    with ShardWriter(path, capture.estimator.columns, about) as writer:
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
    return shard, fidelity


@torch.no_grad()
def _encoded(
    capture: Capture, part: Part, source: Source, tick: Callable[[int], object]
) -> tuple[dict[int, Encoded], Fidelity]:
    """The targets of each example by its place, those of one length asked together."""
    split = capture.named[part.split]
    order = sorted(part.places, key=lambda place: -split.lengths[place])
    size = capture.args.eval_batch_size
    found, fidelity = {}, Fidelity()
    for start in range(0, len(order), size):
        places = order[start : start + size]
        batch = _batch(capture, capture.datasets[part.split], places)
        said = source(batch.for_teacher).whole
        for place, given in zip(places, _examples(capture, part, places, batch, said), strict=True):
            found[place], told = capture.estimator.encode(given)
            fidelity += told
            tick(told.rows)
    return found, fidelity


def _batch(capture: Capture, dataset: Any, places: Sequence[int]) -> Batch:  # noqa: ANN401  what Trainer takes
    """Some examples of a split, on the device of the teacher."""
    with torch.random.fork_rng(devices=[]):  # collators may draw
        examples = [readable(dataset[place], capture.args) for place in places]
        collated = capture.run.collator(examples)
    batch = make_batch(collated, None, seed=capture.args.seed, epoch=0)
    return batch.to(capture.args.device)


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
