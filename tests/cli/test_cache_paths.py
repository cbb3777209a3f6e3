"""Where `llm-distill cache` writes: nowhere that a model, data or a training needs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_distill.cache.manifest import FILE
from tests import on_disk
from tests.cli.conftest import Cli


@pytest.fixture
def own(models: Path, tmp_path: Path) -> Path:
    """Models and data that the test may lose."""
    return Path(shutil.copytree(models, tmp_path / "own"))


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_distill.teachers.Local.open", None)


def cached(own: Path, path: Path | str, **changes: Any) -> dict[str, Any]:
    """Sections of a recipe that caches the teacher."""
    teacher = {"Cached": {"path": str(path), "of": str(own / "teacher")}}
    given = {"student": str(own / "student"), "teacher": teacher}
    return given | {"data": {"path": str(own / "data.jsonl"), "max_length": 32}} | changes


def files(of: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(of)): p.read_bytes() for p in of.rglob("*") if p.is_file()}


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "and the teacher is there"),
        ("teacher", "and the teacher is there"),
        ("student", "and the student is there"),
        ("held", "and the evaluation data is there"),
        ("data.jsonl", "data.jsonl is no folder"),
        ("data.jsonl/cache", "data.jsonl is no folder"),
        ("out", "and training.output_dir is"),
        ("out/cache", "and training.output_dir is"),
        ("made", "holds train-00000.parquet, which no cache wrote"),
        ("other", "holds manifest.json, teacher, which no cache wrote"),
    ],
)
def test_a_path_that_is_taken(
    cli: Cli, content: dict[str, Any], own: Path, path: str, message: str, more: tuple[str, ...]
) -> None:
    training = content["training"] | {"output_dir": str(own / "out")}
    data = {"path": str(own / "data.jsonl"), "eval": str(own / "held" / "data.jsonl")}
    (own / "held").mkdir()
    on_disk.save_data(own / "held" / "data.jsonl")
    (own / "made").mkdir()
    (own / "made" / "train-00000.parquet").write_bytes(b"mine")
    on_disk.save_model(own / "other" / "teacher", "teacher")
    (own / "other" / FILE).write_text("{}")
    before = files(own)
    sections = cached(own, own / path, training=training, data=data)
    ended = cli("cache", *more, **sections)
    assert ended.code == 2
    assert message in ended.err
    assert "write" in ended.err
    assert files(own) == before


def test_a_path_among_the_data(cli: Cli, own: Path) -> None:
    """A run would read the cache as data."""
    (own / "data").mkdir()
    on_disk.save_data(own / "data" / "a.jsonl")
    data = {"path": str(own / "data"), "max_length": 32}
    ended = cli("cache", **cached(own, own / "data" / "cache", data=data))
    assert ended.code == 2
    assert "and the folder of the data is" in ended.err


@pytest.mark.parametrize("command", ["cache", "run", "check"])
@pytest.mark.parametrize("path", ["", " "])
def test_no_path(cli: Cli, own: Path, command: str, path: str) -> None:
    ended = cli(command, **cached(own, path))
    assert ended.code == 2
    assert "write the folder of the cache, such as cache/name" in ended.err


def test_a_student_cut_from_its_teacher(cli: Cli, own: Path) -> None:
    """No run could train it: the weights of the teacher are not there."""
    ended = cli("cache", **cached(own, own / "cache", student={"FromTeacher": {"depth": 2}}))
    assert ended.code == 2
    assert "the teacher is a Cached, whose weights are not here to be copied; write" in ended.err
    assert not (own / "cache").exists()
