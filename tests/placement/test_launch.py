"""How a process was started."""

import psutil
import pytest
import torch

from llm_distill.placement import Launch, caps, launched


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = launched(torch.device("cpu"))
    assert (found.world, found.local, found.device, found.nodes) == (1, 1, "cpu", 1)
    assert 0 < found.free <= psutil.virtual_memory().total


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = launched(torch.device("cpu")).free
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = launched(torch.device("cpu"))
    assert (found.world, found.local, found.nodes) == (8, 4, 2)
    assert found.free < 0.5 * alone


def test_machines() -> None:
    assert Launch(world=24, local=8).nodes == 3


def test_what_a_model_may_take_of_each_place() -> None:
    assert caps(torch.device("cpu"), 7) is None
    found = caps(torch.device("cuda", 1), 7)
    assert found is not None
    assert list(found) == [1, "cpu"]
    assert found[1] == 7
    assert 0 < found["cpu"] <= psutil.virtual_memory().total
