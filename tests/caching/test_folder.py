"""What of a folder is a cache's, and what is not: nothing of anybody else is lost."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_distill.cache.estimators import hidden, topk
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest
from llm_distill.caching import folder, lock, write_cache
from llm_distill.errors import InputError
from tests import caches, launch, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache, with a head."""
    return Path(caches.written(tmp_path_factory.mktemp("whole"), hidden))


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def content(of: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(of)): p.read_bytes() for p in of.rglob("*") if p.is_file()}


class TestPlace:
    @pytest.mark.parametrize("below", ["file", "file/cache", "link", "link/a/b"])
    def test_it_is_no_folder(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        with pytest.raises(InputError, match=r"and .*(file|link) is no folder; write the path of"):
            folder.check_place(tmp_path / below, {})

    @pytest.mark.parametrize("path", ["runs/teacher", "runs", "runs/teacher/../teacher", "link"])
    def test_a_model_is_there(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "runs" / "teacher").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "runs")
        taken = {"the student": "owner/name", "the teacher": str(tmp_path / "runs" / "teacher")}
        with pytest.raises(InputError, match=r"and the teacher is there \(.*write another path"):
            folder.check_place(tmp_path / path, taken)

    def test_the_data_are_there(self, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").write_text("{}")
        with pytest.raises(InputError, match=r"and the data is there .* such as cache/"):
            folder.check_place(tmp_path, {"the data": str(tmp_path / "data.jsonl")})

    def test_a_place_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "teacher").mkdir()
        taken = {"the teacher": str(tmp_path / "teacher")}
        folder.check_place(tmp_path / "cache", taken)
        folder.check_place(tmp_path / "teacher" / "cache", taken)

    @pytest.mark.parametrize(
        ("path", "other"), [("out", "out"), ("out/cache", "out"), ("out", "out/teacher/student")]
    )
    def test_one_in_the_other(self, path: str, other: str) -> None:
        with pytest.raises(
            InputError, match=r"and output_dir is .* two folders, none in the other"
        ):
            folder.check_beside(path, "output_dir", other)

    def test_beside_each_other(self) -> None:
        folder.check_beside("out/cache", "output_dir", "out/student")
        folder.check_beside("out", "output_dir", "out/student")


class TestContent:
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        "name",
        [
            "teacher/model.safetensors",
            "train-00000.parquet",
            "train-00012.part",
            "eval-00003.parquet.json",
            "head.safetensors",
            "index.npy",
            FILE,
            UNFINISHED,
        ],
    )
    def test_files_of_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
    ) -> None:
        """Refused before weights load, and nothing is touched."""
        there = tmp_path / "cache" / name
        there.parent.mkdir(parents=True)
        there.write_text('{"name": "mine"}')
        made = caches.capture(tmp_path)
        monkeypatch.setattr(type(made.run.teacher), "open", None)
        shown = name.partition("/")[0]
        with pytest.raises(InputError, match=rf"holds {shown}, which no cache wrote.*another path"):
            write_cache(made, overwrite=overwrite)
        assert content(tmp_path / "cache") == {name: b'{"name": "mine"}'}

    def test_names_that_no_cache_writes(self, tmp_path: Path) -> None:
        names = ("train-2024.parquet", "train-00000-of-00002.parquet", "eval.parquet", "a.part")
        (tmp_path / "cache").mkdir()
        for name in names:
            (tmp_path / "cache" / name).write_text("mine")
        caches.written(tmp_path)
        write_cache(caches.capture(tmp_path), overwrite=True)
        assert all((tmp_path / "cache" / name).read_text() == "mine" for name in names)

    def test_overwriting_what_others_put_beside_it(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A finished cache lists its files, so that a file it does not list is somebody's."""
        (cache / "eval-00077.parquet").write_text("mine")
        (cache / lock.FILE).write_text(json.dumps(vars(lock.Holder.me()) | {"started": 1.0}))
        (cache / "teacher" / "model.safetensors").write_text("weights")
        before = content(cache)
        made = caches.capture(tmp_path)
        monkeypatch.setattr(type(made.run.teacher), "open", None)
        message = r"holds eval-00077.parquet, teacher/model.safetensors, which no cache wrote"
        with pytest.raises(InputError, match=message):
            write_cache(made, overwrite=True)
        assert content(cache) == before

    def test_many_files_of_others(self, tmp_path: Path) -> None:
        for number in range(5):
            (tmp_path / f"train-{number:05d}.parquet").touch()
        with pytest.raises(InputError, match=r"train-00002.parquet and 2 more, which"):
            folder.check_folder(tmp_path, overwrite=True)

    def test_a_linked_teacher(self, cache: Path, tmp_path: Path) -> None:
        shutil.move(cache / "teacher", tmp_path / "mine")
        (cache / "teacher").symlink_to(tmp_path / "mine")
        with pytest.raises(InputError, match="holds teacher, which no cache wrote"):
            folder.check_folder(cache, overwrite=True)

    def test_the_models_of_a_run_in_python(self, tmp_path: Path) -> None:
        student = tmp_path / "cache" / "student"
        tiny.llama("student").save_pretrained(student)
        before = content(student)
        with pytest.raises(InputError, match="and the student is there"):
            write_cache(caches.capture(tmp_path, student=str(student)))
        assert content(student) == before


class TestClear:
    def test_all_of_a_cache_goes(self, cache: Path) -> None:
        (cache / "teacher" / "chat").mkdir()
        (cache / "teacher" / "chat" / "a.jinja").touch()
        folder.clear(cache)
        assert list(cache.iterdir()) == []

    def test_all_of_an_unfinished_one_goes(self, cache: Path) -> None:
        (cache / FILE).rename(cache / UNFINISHED)
        for name in ("train-00009.part", "train-00009.parquet.part", "unfinished.part", "mine"):
            (cache / name).touch()
        folder.clear(cache)
        assert content(cache) == {"mine": b""}

    def test_nothing_outside_the_folder(self, cache: Path, tmp_path: Path) -> None:
        """Whatever a manifest from elsewhere lists."""
        (tmp_path / "train-00000.parquet").write_text("mine")
        told = json.loads((cache / FILE).read_text())
        told["shards"][0]["file"] = "../train-00000.parquet"
        (cache / FILE).write_text(json.dumps(told))
        folder.clear(cache)
        assert (tmp_path / "train-00000.parquet").read_text() == "mine"

    def test_a_newer_cache(self, cache: Path) -> None:
        """It cannot be read, but it can be written anew."""
        told = json.loads((cache / FILE).read_text())
        (cache / FILE).write_text(json.dumps(told | {"format": 99}))
        with pytest.raises(InputError, match=r"format 99, .*, or write it anew with --overwrite"):
            folder.check_folder(cache, overwrite=False)
        assert not folder.check_folder(cache, overwrite=True)


class TestDone:
    """A cache that is called finished is whole."""

    @pytest.mark.parametrize(
        "name",
        ["train-00000.parquet", "index.npy", "head.safetensors", "teacher/config.json"],
    )
    def test_a_file_is_missing(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (cache / name).unlink()
        made = caches.capture(tmp_path, hidden)
        with monkeypatch.context() as patch:
            patch.setattr(type(made.run.teacher), "open", None)
            message = rf"{name} is missing; copy the cache anew, or write it anew with --overwrite"
            with pytest.raises(InputError, match=message):
                write_cache(made)
        write_cache(made, overwrite=True)
        assert (cache / name).is_file()
        assert folder.check_folder(cache, overwrite=False)

    @pytest.mark.parametrize("name", ["train-00001.parquet", "index.npy", "head.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_a_file_is_cut_short(self, cache: Path, name: str, share: float) -> None:
        whole = (cache / name).read_bytes()
        (cache / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=rf"{name} .*; copy it anew, or write it anew with --"):
            folder.check_folder(cache, overwrite=False)

    def test_it_is_deleted_meanwhile(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By one that overwrites it: without the lock nothing may be written."""
        monkeypatch.setattr("llm_distill.caching.writing._there", lambda *_, **__: None)
        before = content(cache)
        with pytest.raises(InputError, match="another process deleted it; run the same command"):
            write_cache(caches.capture(tmp_path, hidden))
        assert content(cache) == before


class TestAlone:
    def test_nobody_writes_into_it_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second command is refused before weights load, and the first one finishes."""
        from llm_distill.caching.asking import write_shard

        refused: list[str] = []

        def watched(*args: Any) -> Any:
            if not refused:
                with monkeypatch.context() as patch:
                    second = caches.capture(tmp_path, partial(topk, k=8))
                    patch.setattr(type(second.run.teacher), "open", None)
                    with pytest.raises(InputError) as raised:
                        write_cache(second, overwrite=True)
                    refused.append(str(raised.value))
            return write_shard(*args)

        monkeypatch.setattr("llm_distill.caching.writing.write_shard", watched)
        write_cache(caches.capture(tmp_path))
        assert "of this machine is writing a cache into" in refused[0]
        assert Manifest.read(tmp_path / "cache" / FILE).keep == {"topk": {"k": 16}}
        assert not (tmp_path / "cache" / lock.FILE).exists()

    def test_what_was_begun_without_a_manifest_goes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that the next one finds nothing of which nobody knows whose it is."""
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "mine").touch()

        def fail(*_: Any) -> None:
            assert (tmp_path / "cache" / "teacher" / "config.json").exists()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "write", fail)
            with pytest.raises(KeyboardInterrupt):
                write_cache(caches.capture(tmp_path))
        assert content(tmp_path / "cache") == {"mine": b""}
        write_cache(caches.capture(tmp_path))

    def test_killed_before_there_was_a_manifest(self, cache: Path, tmp_path: Path) -> None:
        """The lock that it left says whose the files are."""
        (cache / FILE).unlink()
        mine = lock.take(cache)
        (cache / lock.FILE).write_text(json.dumps(vars(mine) | {"started": 1.0}))
        write_cache(caches.capture(tmp_path))
        assert not (cache / "head.safetensors").exists()

    def test_all_ranks_are_refused(self, tmp_path: Path) -> None:
        """None waits for the first one, which looked at the lock for all."""
        (tmp_path / "cache").mkdir()
        elsewhere = json.dumps(asdict(lock.Holder("elsewhere", 7, 1.0, "")))
        (tmp_path / "cache" / lock.FILE).write_text(elsewhere)
        with pytest.raises(AssertionError) as raised:
            launch.launch("tests.cache_worker", str(tmp_path), ranks=2)
        assert str(raised.value).count("InputError: process 7 on elsewhere is writing") == 2
        assert content(tmp_path / "cache") == {lock.FILE: elsewhere.encode()}
