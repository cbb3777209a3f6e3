"""The end of a cache: whether what lies there was written here, then its index and its manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_distill.cache import fingerprints
from llm_distill.cache.encoded import Fidelity
from llm_distill.cache.index import FILE as INDEX
from llm_distill.cache.index import Index, Place
from llm_distill.cache.layers import Lost
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest, Shard
from llm_distill.cache.shards import ShardReader
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.caching.plan import Capture


def finish(capture: Capture, begun: Manifest) -> None:
    """Index and manifest, which is the last to be written; the notes go.

    Args:
        capture: All of whose shards are there.
        begun: The manifest as it was begun here.

    Raises:
        InputError: If something there was written by somebody else.
    """
    folder = capture.folder
    there = Manifest.read(folder / UNFINISHED)
    _refuse_strange(capture, there.differences(begun))
    notes = [json.loads(capture.note(p).read_text(encoding="utf-8")) for p in capture.parts]
    shards = tuple(Shard(**note["shard"]) for note in notes)
    fidelity = sum((Fidelity(**note["fidelity"]) for note in notes), start=Fidelity())
    keys: list[bytes] = []
    places: list[Place] = []
    for number, shard in enumerate(shards):
        reader = ShardReader.open(folder / shard.file, ())
        for group, found in enumerate(reader.keys_by_group()):
            keys += found
            places += (Place(number, group, row) for row in range(len(found)))
    Index.of(keys, places).write(folder)
    index = fingerprints.of_file(folder / INDEX)
    told = {**fidelity.means(), **there.fidelity}
    finished = replace(there, shards=shards, index=index, fidelity=told)
    replace(finished, lost=_lost(notes)).write(folder / FILE)
    for part in capture.parts:
        capture.note(part).unlink()
    (folder / UNFINISHED).unlink()


def _refuse_strange(capture: Capture, differ: Sequence[str]) -> None:
    """Refuse to sign for what another process wrote, where its lock was of no use.

    Raises:
        InputError: Saying what.
    """
    strange = [part.file for part in capture.parts if not capture.is_whole(part)]
    if differ or strange:
        what = f"a cache that differs in {', '.join(differ)}" if differ else ", ".join(strange[:3])
        raise InputError(
            f"another process wrote {what} into {capture.folder} while this one did; see that one "
            "writes there, and run the same command again, which goes on"
        )


def _lost(notes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What the kept states lost, by layer, over all shards."""
    total: dict[str, Lost] = {}
    for note in notes:
        for layer, lost in note.get("lost", {}).items():
            total[layer] = total.get(layer, Lost()) + Lost(**lost)
    return {k: {"mean": lost.mean, "worst": lost.worst} for k, lost in total.items()}
