"""Benchmarks of a few rows, quiet and fast."""

from __future__ import annotations

import pytest

from scripts.bench import machine, rivals, run


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for the matrix library; warnings stay errors; the environment is put back."""
    monkeypatch.setattr(machine, "cpu_backend", lambda dtype: f"told {dtype}")
    monkeypatch.setattr(run, "quiet", lambda: None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rival is installed."""
    monkeypatch.setattr(rivals, "find_spec", lambda package: None)
