"""A whole cache: killed and resumed, on ranks, refused where it would mix or not fit."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel

from llm_distill.cache.estimators import hidden, sampled, topk
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest
from llm_distill.cache.store import Store
from llm_distill.caching import write_cache, writing
from llm_distill.caching.asking import write_shard
from llm_distill.errors import InputError
from tests import caches, launch, tiny

WORKER = "tests.cache_worker"


def files(folder: Path) -> dict[str, bytes]:
    there = [*sorted(folder.glob("*.parquet")), folder / "index.npy"]
    return {p.name: p.read_bytes() for p in there}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was written in one go."""
    return Path(caches.written(tmp_path_factory.mktemp("whole")))


def test_what_a_finished_cache_holds(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert {FILE, "index.npy", "teacher", "train-00000.parquet"} <= names
    assert UNFINISHED not in names
    assert not [name for name in names if name.endswith((".part", ".parquet.json"))]
    made = Manifest.read(whole / FILE)
    assert (made.teacher, made.dtype, made.shift) == ("LlamaForCausalLM", "float32", True)
    assert made.temperature == 1.0
    assert made.versions["torch"] == torch.__version__.partition("+")[0] or made.versions["torch"]
    assert 0 < made.fidelity["kl"] < 2e-5
    assert made.fidelity["kl"] <= made.fidelity["worst"]
    assert len(Store.open(whole).index) == sum(shard.examples for shard in made.shards) == 31


def test_datasets_loads_it(whole: Path, tmp_path: Path) -> None:
    splits = {"train": str(whole / "train-*.parquet"), "eval": str(whole / "eval-*.parquet")}
    loaded = datasets.load_dataset("parquet", data_files=splits, cache_dir=str(tmp_path))
    assert (len(loaded["train"]), len(loaded["eval"])) == (23, 8)


def test_written_again_nothing_happens(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_distill.caching.writing.write_shard", None)
    before = files(whole)
    made = caches.capture(whole.parent)
    assert write_cache(made) == Manifest.read(whole / FILE)
    assert files(whole) == before


@pytest.mark.parametrize("done", [0, 1, 3])
def test_stopped_and_resumed_it_is_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    made = caches.capture(tmp_path)
    original = write_shard
    calls: list[int] = []

    def counting(*args: Any, most: int | None = done) -> Any:
        calls.append(args[1].number)
        if len(calls) - 1 == most:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr("llm_distill.caching.writing.write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        write_cache(made)
    assert not (made.folder / FILE).exists()
    (made.folder / "train-00001.part").write_bytes(b"half of a shard")
    calls.clear()
    monkeypatch.setattr("llm_distill.caching.writing.write_shard", partial(counting, most=None))
    write_cache(caches.capture(tmp_path))
    assert calls == list(range(done, len(made.parts)))
    assert files(made.folder) == files(whole)


def test_killed_for_good_and_resumed(whole: Path, tmp_path: Path) -> None:
    """SIGKILL while the third shard is written; a new process goes on behind the second."""
    command = [sys.executable, "-m", WORKER, str(tmp_path), "2"]
    done = subprocess.run(command, cwd=launch.ROOT, capture_output=True, check=False, timeout=180)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    folder = tmp_path / "cache"
    assert (folder / UNFINISHED).exists()
    assert len(list(folder.glob("*.parquet"))) == 2
    assert "wrote shards" in launch.launch(WORKER, str(tmp_path))
    assert files(folder) == files(whole)


def test_two_processes_write_the_same(whole: Path, tmp_path: Path) -> None:
    told = launch.launch(WORKER, str(tmp_path), ranks=2)
    assert told.count("wrote shards") == 2
    parts = len(Manifest.read(whole / FILE).shards)
    assert f"wrote shards {list(range(0, parts, 2))}" in told
    assert f"wrote shards {list(range(1, parts, 2))}" in told
    assert files(tmp_path / "cache") == files(whole)


class TestRefused:
    def other(self) -> PreTrainedModel:
        model = tiny.llama("teacher")
        with torch.no_grad():
            model.model.norm.weight[0] += 0.1
        return model

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"keep": sampled}, "what is kept"),
            ({"keep": partial(topk, k=8)}, "what is kept"),
            ({"model": "other"}, "the weights of the teacher"),
            ({"train_dataset": tiny.rows(23)}, "the data"),
        ],
    )
    @pytest.mark.parametrize("name", [FILE, UNFINISHED])
    def test_another_cache_is_there(
        self, whole: Path, tmp_path: Path, changes: dict[str, Any], words: str, name: str
    ) -> None:
        shutil.copytree(whole, tmp_path / "cache")
        (tmp_path / "cache" / FILE).rename(tmp_path / "cache" / name)
        given = {**changes, "model": self.other()} if "model" in changes else changes
        before = files(tmp_path / "cache")
        with pytest.raises(InputError, match=f"that differs in {words}.*--overwrite to lose it"):
            write_cache(caches.capture(tmp_path, **given))
        assert files(tmp_path / "cache") == before

    def test_overwriting_leaves_nothing_of_it(self, whole: Path, tmp_path: Path) -> None:
        shutil.copytree(whole, tmp_path / "cache")
        (tmp_path / "cache" / "notes.txt").write_text("mine")
        made = caches.capture(tmp_path, sampled, train_dataset=tiny.rows(3), eval_dataset=None)
        written = write_cache(made, overwrite=True)
        there = {p.name for p in (tmp_path / "cache").glob("*.parquet")}
        assert there == {shard.file for shard in written.shards}
        assert (tmp_path / "cache" / "notes.txt").read_text() == "mine"

    def test_a_disk_that_is_too_small(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = caches.capture(tmp_path)
        monkeypatch.setattr(type(made.run.teacher), "open", None)  # before weights load
        free = replace_free(1000)
        monkeypatch.setattr("shutil.disk_usage", free)
        with pytest.raises(InputError, match=r"the cache would take about .* kB, and the disk of"):
            write_cache(made)
        assert not made.folder.exists()

    def test_a_sharded_teacher(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(writing, "in_pieces", lambda _: True)
        made = caches.capture(tmp_path)
        with pytest.raises(InputError, match=r"the teacher is sharded .* device_map: auto"):
            write_cache(made)
        assert not made.folder.exists()

    def test_settings_that_do_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="topk: k is 500; write a number from 1 to 128"):
            write_cache(caches.capture(tmp_path, partial(topk, k=500)))


def replace_free(free: int) -> Any:
    """`disk_usage` of a disk with so many bytes left."""
    return lambda path: shutil._ntuple_diskusage(free, 0, free) if path else None


def test_room_is_asked_for_what_is_left_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = caches.capture(tmp_path)
    needed = writing.SPARE * made.row_bytes * sum(made.rows(part) for part in made.parts)
    monkeypatch.setattr("shutil.disk_usage", replace_free(int(needed) + 1))
    writing.check_disk(made)
    monkeypatch.setattr("shutil.disk_usage", replace_free(int(needed) - 1))
    with pytest.raises(InputError, match="would take about"):
        writing.check_disk(made)
    shutil.copytree(whole, made.folder)
    manifest = Manifest.read(made.folder / FILE)
    for part, shard in zip(made.parts[:2], manifest.shards, strict=False):
        note = {"shard": {"bytes": shard.bytes}, "keys": made.digest(part)}
        made.note(part).write_text(json.dumps(note))
    writing.check_disk(made)


def test_progress_and_bytes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = caches.capture(tmp_path)
    made.args.disable_tqdm = False
    write_cache(made)
    shown = capsys.readouterr().err
    rows = sum(made.rows(part) for part in made.parts)
    assert f"{rows:,} of {rows:,} tokens" in " ".join(shown.split())
    assert "bytes each" in " ".join(shown.split())


def test_no_secret_path_in_what_is_written(tmp_path: Path) -> None:
    from llm_distill import Local

    tiny.llama("teacher").save_pretrained(tmp_path / "private" / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "private" / "teacher")
    made = caches.capture(tmp_path)
    teacher = Local(str(tmp_path / "private" / "teacher"))
    moved = replace(made, run=replace(made.run, teacher=teacher))
    write_cache(moved)
    assert Manifest.read(moved.folder / FILE).teacher == "teacher"
    for path in moved.folder.rglob("*"):
        assert path.is_dir() or b"private" not in path.read_bytes(), path


def test_the_head_of_the_teacher_lies_beside_hidden_states(tmp_path: Path) -> None:
    folder = Path(caches.written(tmp_path, hidden))
    head = Store.open(folder).head()
    assert head is not None
    assert torch.equal(head.weight, tiny.llama("teacher").lm_head.weight)
