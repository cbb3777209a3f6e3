"""A whole cache: killed and resumed, on ranks, refused where it would mix or not fit."""

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

from llm_distill import AttentionMaps, HiddenStates, Local, publishing
from llm_distill.cache.estimators import hidden, sampled, topk
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest
from llm_distill.cache.store import Store
from llm_distill.caching import write_cache, writing
from llm_distill.caching.asking import write_shard
from llm_distill.errors import InputError
from llm_distill.layers import auto_race, last
from tests import caches, launch, tiny
from tests.caching.test_room import room_left

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
    assert not [name for name in names if name.endswith((".part", ".parquet.json", UNFINISHED))]
    made = Manifest.read(whole / FILE)
    assert (made.teacher, made.dtype, made.shift) == ("LlamaForCausalLM", "float32", True)
    assert made.temperature == 1.0
    assert made.versions == publishing.versions()
    assert made.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
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


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with hidden states."""
    folder = tmp_path_factory.mktemp("hinted")
    return Path(caches.written(folder, hints=[HiddenStates(rows="valid")]))


class TestHints:
    """Hidden states on a map that is decided when writing begins."""

    def test_what_is_there(self, hinted: Path) -> None:
        made = Manifest.read(hinted / FILE)
        kept = made.layers
        assert kept is not None
        assert made.maps["HiddenStates"]["strategy"] == "auto"
        rows = made.maps["HiddenStates"]["map"]["rows"]
        assert set(kept.layers) == {layer for row in rows for layer, _ in row["teacher"]}
        assert (kept.rows, kept.features, kept.width) == ("valid", 64, 64)
        assert set(made.lost) == {str(layer) for layer in kept.layers}
        for lost in made.lost.values():
            assert 0 < lost["mean"] < 1e-4
            assert lost["mean"] <= lost["worst"]
        assert (hinted / "states.safetensors").exists()
        tokens = sum(map(len, tiny.rows(32)["input_ids"]))
        assert tokens > made.rows
        loaded = datasets.Dataset.from_parquet(str(hinted / "train-00000.parquet"))
        assert set(made.columns) <= set(loaded.column_names)

    def test_killed_for_good_and_resumed(self, hinted: Path, tmp_path: Path) -> None:
        """A new process takes the map and the frames of the one before."""
        command = [sys.executable, "-m", WORKER, str(tmp_path), "2", "hints"]
        done = subprocess.run(
            command, cwd=launch.ROOT, capture_output=True, check=False, timeout=180
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        folder = tmp_path / "cache"
        begun = Manifest.read(folder / UNFINISHED)
        assert begun.maps == Manifest.read(hinted / FILE).maps
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # figures of the first survey
        frames = (folder / "states.safetensors").stat().st_mtime_ns
        told = launch.launch(WORKER, str(tmp_path), "-1", "hints")
        parts = len(Manifest.read(hinted / FILE).shards)
        assert f"wrote shards {list(range(2, parts))}" in told
        assert (folder / "states.safetensors").stat().st_mtime_ns == frames
        assert not (tmp_path / "out" / "calibration.safetensors").exists()
        assert files(folder) == files(hinted)

    def test_two_processes_write_the_same(self, hinted: Path, tmp_path: Path) -> None:
        launch.launch(WORKER, str(tmp_path), "-1", "hints", ranks=2)
        assert files(tmp_path / "cache") == files(hinted)
        one, two = (Manifest.read(f / FILE) for f in (hinted, tmp_path / "cache"))
        assert (one.maps, one.frames, one.states) == (two.maps, two.frames, two.states)

    def test_written_again_nothing_happens(
        self, hinted: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llm_distill.caching.writing.write_shard", None)
        monkeypatch.setattr("llm_distill.surveying.survey", None)
        made = caches.capture(hinted.parent, hints=[HiddenStates(rows="valid")])
        assert write_cache(made) == Manifest.read(hinted / FILE)

    @pytest.mark.parametrize(
        "changes",
        [
            {"hints": []},
            {"hints": [HiddenStates()]},
            {"hints": [HiddenStates(layers=last, rows="valid")]},
            {"hints": [HiddenStates(rows="valid")], "width": 8},
        ],
    )
    def test_other_states_are_there(
        self, hinted: Path, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        shutil.copytree(hinted, tmp_path / "cache")
        with pytest.raises(InputError, match="that differs in the kept hidden states; write"):
            write_cache(caches.capture(tmp_path, **changes))

    @pytest.mark.parametrize(
        ("hint", "message"),
        [
            (HiddenStates(layers=auto_race), "auto_race trains copies of the student"),
            (AttentionMaps(layers=last), "reads hidden states; leave it out"),
        ],
    )
    def test_what_it_cannot_serve(
        self, tmp_path: Path, hint: HiddenStates | AttentionMaps, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            write_cache(caches.capture(tmp_path, hints=[hint]))
        assert not (tmp_path / "cache").exists()

    def test_overwriting_leaves_nothing_of_it(self, hinted: Path, tmp_path: Path) -> None:
        shutil.copytree(hinted, tmp_path / "cache")
        write_cache(caches.capture(tmp_path), overwrite=True)
        assert not (tmp_path / "cache" / "states.safetensors").exists()


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
        free = room_left(1000)
        monkeypatch.setattr("shutil.disk_usage", free)
        with pytest.raises(InputError, match=r"the cache may take .* kB, and the disk of"):
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


def test_progress_and_bytes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = caches.capture(tmp_path)
    made.args.disable_tqdm = False
    write_cache(made)
    shown = capsys.readouterr().err
    rows = sum(made.rows(part) for part in made.parts)
    assert f"{rows:,} of {rows:,} tokens" in " ".join(shown.split())
    assert "bytes each" in " ".join(shown.split())


def test_no_secret_path_in_what_is_written(tmp_path: Path) -> None:
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
