"""Races that take little or no time."""

import pytest

from llm_distill.race.halving import Arm
from llm_distill.race.heats import Heats


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trainings that take no time; `middle and last`, then `uniform` is the best map."""
    told: list[tuple[str, int]] = []

    def measure(self: Heats, arm: Arm, steps: int) -> float:
        told.append((arm.describe(), steps))
        order = {"middle and last": 1.0, "uniform": 2.0, "none": 3.0}
        return order.get(arm.name, 4.0) + arm.blockwise

    monkeypatch.setattr(Heats, "measure", measure)
    return told


@pytest.fixture
def no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hint is better than any."""
    monkeypatch.setattr(Heats, "measure", lambda _, arm, steps: 1.0 + (arm.mapping is not None))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first three trainings are real: no hint, and two hints."""
    measure, calls = Heats.measure, 0

    def fake(self: Heats, arm: Arm, steps: int) -> float:
        nonlocal calls
        calls += 1
        return measure(self, arm, steps) if calls <= 3 else 1.0 + (arm.mapping is None)

    monkeypatch.setattr(Heats, "measure", fake)
