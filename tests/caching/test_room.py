"""What a disk has to hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_distill import HiddenStates
from llm_distill.cache.manifest import FILE, Manifest
from llm_distill.caching import write_cache
from llm_distill.caching.room import SPARE, check_disk
from llm_distill.errors import InputError
from tests import caches


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache."""
    made = caches.capture(tmp_path_factory.mktemp("whole"))
    write_cache(made)
    return made.folder


def room_left(free: int) -> Any:
    """`disk_usage` of a disk with so many bytes left."""
    return lambda path: shutil._ntuple_diskusage(free, 0, free) if path else None


def test_room_is_asked_for_what_is_left_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = caches.capture(tmp_path)
    needed = SPARE * made.row_bytes * sum(made.rows(part) for part in made.parts)
    monkeypatch.setattr("shutil.disk_usage", room_left(int(needed) + 1))
    check_disk(made)
    monkeypatch.setattr("shutil.disk_usage", room_left(int(needed) - 1))
    with pytest.raises(InputError, match="would take about"):
        check_disk(made)
    shutil.copytree(whole, made.folder)
    manifest = Manifest.read(made.folder / FILE)
    for part, shard in zip(made.parts[:2], manifest.shards, strict=False):
        note = {"shard": {"bytes": shard.bytes}, "keys": made.digest(part)}
        made.note(part).write_text(json.dumps(note))
    check_disk(made)


def test_the_disk_has_room_for_states_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = caches.capture(tmp_path)
    made = caches.capture(tmp_path, hints=[HiddenStates(rows="valid")])
    sizes = [sum(each.bytes(part) for part in each.parts) for each in (plain, made)]
    assert sizes[1] > 2 * sizes[0]
    monkeypatch.setattr("shutil.disk_usage", room_left(int(2 * sizes[0])))
    check_disk(plain)
    with pytest.raises(InputError, match=r"or keep less: keep: .*, states_width: 256"):
        check_disk(made)
