"""What a report says about the machine."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

from scripts.bench import machine
from scripts.bench.machine import Machine
from scripts.bench.settings import HeadSettings

if TYPE_CHECKING:
    import pytest


def test_here() -> None:
    here = Machine.here(HeadSettings(), ["head", "--rows", "8"])
    assert here.command == "python -m scripts.bench head --rows 8"
    assert here.versions["torch"]
    assert "cores" in here.processor
    assert here.gpu is None
    assert here.backend == "told float32"
    assert here.commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", here.commit)


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert list(machine.versions()) == ["torch"]


def test_outside_of_git_there_is_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine._commit() is None


def test_the_matrix_library_says_its_name() -> None:
    real = importlib.reload(machine).cpu_backend
    assert re.match(r"MKL \w*GEMM|oneDNN \S+|not told", real("float32"))
