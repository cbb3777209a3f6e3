"""How a process was started."""

import psutil
import pytest
import torch
import torch.distributed as dist

from llm_distill.placement import Launch, caps, launch, launched


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


def test_what_a_model_may_take_of_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert caps(torch.device("cpu"), 7) is None
    found = caps(torch.device("cuda", 1), 7)
    assert found is not None
    assert list(found) == [1, "cpu"]
    assert found[1] == 7
    assert 0 < found["cpu"] <= psutil.virtual_memory().total


def test_processes_of_a_machine_share_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "free_bytes", lambda device: 800)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert caps(torch.device("cuda", 3), 7) == {3: 7, "cpu": 200}
    assert caps(torch.device("cpu"), 100) == {"cpu": 100}


def test_machines_agree_on_how_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hears of all others: 10 processes on one machine and 6 on another."""

    def gather(found: list[torch.Tensor], own: torch.Tensor) -> None:
        del own
        for place, tensor in enumerate(found):
            tensor.copy_(torch.tensor([100 + place, 10 if place < 10 else 6]))

    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(dist, "all_gather", gather)
    found = launched(torch.device("cpu"))
    assert (found.world, found.local, found.divisor, found.free) == (16, 10, 2, 100)
    assert not found.even
