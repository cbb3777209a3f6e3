"""A `device_map` of several processes: what is refused, and where each copy goes.

That they train as one process does: test_sharding.
"""

from typing import Any

import pytest
import torch

from llm_distill.errors import InputError
from llm_distill.placement import Launch, check_device_map, is_word, own_places
from llm_distill.placement.choice import Facts
from tests import tiny

SAFE: list[Any] = [None, "cpu", {"": "cpu"}, {"": torch.device("cpu")}, tiny.DISK]
CROWDED: list[tuple[Any, str]] = [
    ({"": 0}, "0"),
    ({"": "cuda:1"}, "cuda:1"),
    ({"model": torch.device("cuda", 1), "lm_head": "cpu"}, "cuda:1"),
    ({"model": 0, "model.norm": 1, "lm_head": "disk"}, "0, 1"),
    ("cuda", "cuda"),
]


@pytest.mark.parametrize("device_map", SAFE)
@pytest.mark.parametrize("quantised", [False, True])
def test_memory_and_disk_are_every_processs_own(
    device_map: Any, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_device_map(device_map, "m", quantised=quantised)


@pytest.mark.parametrize(("device_map", "taken"), CROWDED)
def test_gpus_that_are_named_are_refused(
    device_map: Any, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_device_map(device_map, "m", quantised=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    wanted = f"with 2 processes would put every process's copy on the same {taken}; write device_ma"
    with pytest.raises(InputError, match=wanted):
        check_device_map(device_map, "m", quantised=False)


@pytest.mark.parametrize("word", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_word_is_for_each_process(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_device_map(word, "m", quantised=False)
    assert is_word(word)
    assert not is_word({"": "cpu"})
    assert not is_word("cpu")
    with pytest.raises(InputError, match=f"device_map='{word}' with 2 processes may leave .*; lea"):
        check_device_map(word, "m", quantised=True)


def test_room_is_left_for_the_student() -> None:
    placed = own_places("auto", Launch(world=4, local=2, device="cuda", free=1000))
    assert (placed.kind, placed.room, placed.replicas, placed.pieces) == ("offload", 500, 4, 1)
    assert placed.describe(Facts("m", 2 * 10**9)) == (
        "teacher m: 2.0 GB, offload (device_map: auto, for each of 4 processes on its own)"
    )
