"""What a disk has to hold."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_distill import HiddenStates, Local
from llm_distill.cache.estimators import hidden, hybrid, sampled, topk
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest
from llm_distill.caching import room, write_cache
from llm_distill.caching.room import OF_TOKEN, SMALL, _tokenizer_bytes, check_disk, most_bytes
from llm_distill.errors import InputError
from llm_distill.layers import explicit
from tests import caches, on_disk, tiny


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
    needed = most_bytes(made)
    monkeypatch.setattr("shutil.disk_usage", room_left(int(needed) + 1))
    check_disk(made)
    monkeypatch.setattr("shutil.disk_usage", room_left(int(needed) - 1))
    with pytest.raises(InputError, match="may take"):
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
    sizes = [most_bytes(each) for each in (plain, made)]
    assert sizes[1] > sizes[0] + 2 * 64 * sum(map(len, tiny.rows(32)["input_ids"]))
    monkeypatch.setattr("shutil.disk_usage", room_left(int(sizes[0]) + 1))
    check_disk(plain)
    with pytest.raises(InputError, match=r"or keep less: keep: .*, states_width: 256"):
        check_disk(made)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


LONG, SHORT = tiny.POSITIONS, 7
HINT = HiddenStates(layers=partial(explicit, pairs=[[1, 2], [2, 4]]))


class TestBytes:
    """What is asked for is no less than what is written, every file counted, and not far more."""

    def both(self, folder: Path, keep: Any, length: int, **changes: Any) -> tuple[float, int]:
        """Bytes that are asked for, and those of all files in the folder."""
        rows = tiny.rows(600, longest=length)
        given = {"train_dataset": rows.select(range(500)), "eval_dataset": rows.select([*range(9)])}
        made = caches.capture(folder, keep, shard_rows=20_000, **given, **changes)
        asked = most_bytes(made)
        write_cache(made)
        return asked, size_of(made.folder)

    @pytest.mark.parametrize("length", [LONG, SHORT], ids=["long", "short"])
    @pytest.mark.parametrize(
        "keep",
        [
            partial(topk, k=2),
            partial(topk, k=24),
            partial(sampled, n=2),
            partial(sampled, n=12),
            partial(hybrid, m=8, n=8),
            hidden,
        ],
        ids=["top 2", "top 24", "2 draws", "12 draws", "hybrid", "hidden"],
    )
    def test_of_logits(self, tmp_path: Path, keep: Any, length: int) -> None:
        asked, there = self.both(tmp_path, keep, length)
        assert there <= asked <= 1.5 * there + SMALL

    @pytest.mark.parametrize("length", [LONG, SHORT], ids=["long", "short"])
    @pytest.mark.parametrize("width", [None, 24])
    def test_of_states(self, tmp_path: Path, length: int, width: int | None) -> None:
        hints = [replace(HINT, rows="valid")]
        changes = {"hints": hints, "width": width}
        asked, there = self.both(tmp_path, partial(topk, k=8), length, **changes)
        assert there <= asked <= 1.5 * there + SMALL

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
    def test_states_are_of_the_dtype_that_is_loaded(
        self, tmp_path: Path, dtype: str | None
    ) -> None:
        """Not of the checkpoint's, unless nothing else is said."""
        tiny.llama("teacher").bfloat16().save_pretrained(tmp_path / "teacher")
        local = Local(str(tmp_path / "teacher"), dtype=dtype)
        made = caches.capture(tmp_path, hidden)
        made = replace(made, run=replace(made.run, teacher=local))
        size = 4 if dtype == "float32" else 2
        assert made.row_bytes == 64 * size
        asked = most_bytes(made)
        manifest = write_cache(made)
        assert manifest.head is not None
        assert manifest.head["dtype"] == (dtype or "bfloat16")
        assert size_of(made.folder) <= asked

    def test_files_beside_the_shards_count(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Index, head, frames and tokenizer, none of which is small here."""
        given = {"train_dataset": tiny.rows(300), "width": 60}
        made = caches.capture(tmp_path, hidden, hints=[replace(HINT, rows="valid")], **given)
        write_cache(made)
        names = ("index.npy", "head.safetensors", "states.safetensors", "teacher/tokenizer.json")
        sizes = [(made.folder / name).stat().st_size for name in names]
        assert min(sizes) > 3000
        monkeypatch.setattr(type(made), "is_whole", lambda *_: True)
        monkeypatch.setattr(room, "SMALL", 0)
        monkeypatch.setattr(room, "OF_NOTE", 0)
        assert most_bytes(made) == pytest.approx(sum(sizes), abs=2500)

    def test_those_that_are_there_already_do_not(self, tmp_path: Path) -> None:
        made = caches.capture(tmp_path, hidden)
        before = most_bytes(made)
        made.folder.mkdir()
        (made.folder / UNFINISHED).touch()
        assert most_bytes(made) < before - SMALL - tiny.VOCABULARY * 64 * 4

    def test_a_tokenizer(self, tmp_path: Path) -> None:
        on_disk.tokenizer().save_pretrained(tmp_path)
        there = size_of(tmp_path)
        assert there <= _tokenizer_bytes(on_disk.tokenizer()) + SMALL / 8 <= there + SMALL

    def test_a_tokenizer_that_does_not_say(self) -> None:
        slow: Any = type("Slow", (list,), {})(range(500))
        assert _tokenizer_bytes(slow) == 500 * OF_TOKEN
        assert _tokenizer_bytes(None) == 0
