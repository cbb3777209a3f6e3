"""The command line on tiny models, in this process."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest

from llm_distill.cli import main
from llm_distill.recipe import document
from tests import on_disk


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ended]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student, teacher and data, which no test writes to."""
    return on_disk.fill(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def content(models: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of two steps, its output in the test's own folder."""
    made = on_disk.document(models)
    made["training"]["output_dir"] = str(tmp_path / "out")
    return copy.deepcopy(made)


@pytest.fixture
def cli(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run a command on the recipe, after changing its sections in place."""

    def run(command: str, *arguments: str, **sections: Any) -> Ended:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(document.dump({**content, **sections}), encoding="utf-8")
        code = main([command, str(recipe), *arguments])
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return run
