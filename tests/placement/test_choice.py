"""Where a teacher goes: a table of sizes and launches, and what is refused before weights load."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from llm_distill.errors import InputError
from llm_distill.placement import Facts, Launch, Placement, choose

GB = 10**9
NODE = Launch(world=8, local=8, device="cuda", free=79 * GB)
TWO = Launch(world=16, local=8, device="cuda", free=79 * GB)
ONE = Launch(free=79 * GB)


def model(size: int = GB, **changes: Any) -> Facts:
    given: dict[str, Any] = {"heads": 32, "kv_heads": 8, "splits": True, "blocks": "model.layers"}
    return Facts("m", size, **given | changes)


@pytest.mark.parametrize(
    ("size", "launch", "kind", "numbers"),
    [
        (15 * GB, ONE, "replica", (1, 1, 1)),
        (15 * GB, NODE, "replica", (1, 8, 1)),
        (39 * GB, NODE, "replica", (1, 8, 1)),
        (40 * GB, NODE, "fsdp2", (8, 1, 1)),
        (141 * GB, NODE, "fsdp2", (8, 1, 1)),
        (141 * GB, TWO, "hsdp", (8, 2, 1)),
        (141 * GB, ONE, "offload", (1, 1, 1)),
        # One process on each of four machines: there is nobody inside a machine to share with.
        (141 * GB, Launch(world=4, local=1, free=79 * GB), "fsdp2", (4, 1, 1)),
    ],
)
def test_automatic(size: int, launch: Launch, kind: str, numbers: tuple[int, int, int]) -> None:
    placed = choose("auto", None, model(size), launch)
    assert placed.kind == kind
    assert (placed.fsdp, placed.replicas, placed.tp) == numbers
    assert placed.room == (launch.free // 2 if kind == "offload" else 0)
    assert "free" in placed.reason


@pytest.mark.parametrize(
    ("shard", "size", "launch", "numbers"),
    [
        ("replica", None, NODE, (1, 8, 1)),
        ("fsdp2", None, TWO, (16, 1, 1)),
        ("zero3", None, replace(TWO, deepspeed=True), (16, 1, 1)),
        ("hsdp", None, TWO, (8, 2, 1)),
        ("hsdp", 4, NODE, (4, 2, 1)),
        ("tp", None, NODE, (1, 1, 8)),
        ("tp", None, TWO, (2, 1, 8)),
        ("tp", 2, NODE, (4, 1, 2)),
    ],
)
def test_as_asked(shard: Any, size: int | None, launch: Launch, numbers: Any) -> None:
    placed = choose(shard, size, model(), launch)
    assert (placed.fsdp, placed.replicas, placed.tp) == numbers
    if shard != "replica":
        assert placed.fsdp * placed.replicas * placed.tp == launch.world


@pytest.mark.parametrize(
    ("shard", "size", "facts", "launch", "message"),
    [
        ("fsdp2", None, model(), ONE, "spreads it over processes and there is one; start several"),
        ("tp", None, model(), ONE, "or write device_map: auto"),
        ("auto", 2, model(), NODE, "shard_size=2 without a shard"),
        (
            "zero3",
            None,
            model(),
            NODE,
            "needs a run of DeepSpeed .*, and this is none; write shard",
        ),
        ("zero3", None, model(), replace(ONE, deepspeed=True), "and there is one; start several"),
        ("zero3", 4, model(), replace(NODE, deepspeed=True), "takes no shard_size .4.; leave it"),
        ("zero3", None, model(quantised=True), replace(NODE, deepspeed=True), "cannot be cut into"),
        ("fsdp2", 4, model(), NODE, "takes no shard_size .4.; leave it out, or write shard: hsdp"),
        ("hsdp", 3, model(), NODE, "3 of 8 processes to a copy; write shard_size: 2 or 4, or"),
        (
            "tp",
            3,
            model(),
            NODE,
            "3 of 8 processes to a copy; write shard_size: 2 or 4 or 8, or sh",
        ),
        ("hsdp", None, model(), Launch(world=2), "1 of 2 processes to a copy; write shard: fsdp2"),
        ("hsdp", None, model(), NODE, "one machine with 8 processes; write shard: fsdp2"),
        (
            "hsdp",
            6,
            model(),
            Launch(world=12, local=4, free=GB),
            "do not fit 4 on each machine; write shard_size: 2 or 4, or shard: fsdp2",
        ),
        ("tp", None, model(splits=False), NODE, "no tensor-parallel plan for it; write shard: fsd"),
        ("tp", None, model(kv_heads=4), NODE, "8 processes cannot share its 4 key and value heads"),
        ("tp", None, model(kv_heads=4), NODE, "write shard_size: 4, or shard: fsdp2"),
        ("tp", None, model(heads=25, kv_heads=25), NODE, "its 25 query heads; write shard: fsdp2"),
        ("tp", None, model(quantised=True), NODE, "quantised and cannot be cut into pieces"),
        ("auto", None, model(90 * GB, quantised=True), NODE, "its weights are quantised"),
        ("auto", None, model(90 * GB, quantised=True, travels=False), ONE, "cannot wait elsewhere"),
        ("fsdp2", None, model(blocks=None), NODE, "blocks are not to be found"),
        ("auto", None, model(90 * GB, blocks=None), NODE, "write shard: replica to load it whole"),
    ],
)
def test_refused(shard: Any, size: int | None, facts: Facts, launch: Launch, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(shard, size, facts, launch)


UNEVEN = [
    (Launch(world=12, local=8, free=79 * GB), "2 or 4"),
    (Launch(world=10, local=4, free=79 * GB), "2"),
    (Launch(world=16, local=8, free=79 * GB, divisor=4), "2 or 4"),  # 8 + 4 + 4
    (Launch(world=16, local=10, free=79 * GB, divisor=2), "2"),  # 10 + 6
]
"""Machines of different sizes, and numbers of processes that share a copy inside each."""


@pytest.mark.parametrize(("launch", "fitting"), UNEVEN)
class TestMachinesOfDifferentSizes:
    def test_a_number_for_each_machine_is_not_made_up(self, launch: Launch, fitting: str) -> None:
        there = f"{launch.world} processes are not {launch.local} on each machine"
        with pytest.raises(InputError, match=f"{there}, so that .*; start the same number on ev"):
            choose("auto", None, model(141 * GB), launch)
        for shard in ("hsdp", "tp"):
            with pytest.raises(InputError, match=f"{there}; .*, write shard_size: {fitting}, or s"):
                choose(shard, None, model(), launch)

    def test_a_copy_that_crosses_machines_is_refused(self, launch: Launch, fitting: str) -> None:
        size = launch.world // 2
        wanted = f"{size} processes to a copy do not fit each machine, as {launch.world} processes"
        with pytest.raises(InputError, match=f"{wanted} .*; write shard_size: {fitting}, or shard"):
            choose("hsdp", size, model(), launch)

    def test_what_fits_is_placed_on_all_processes(self, launch: Launch, fitting: str) -> None:
        asked: list[tuple[Any, int | None, int]] = [("auto", None, GB), ("fsdp2", None, GB)]
        asked += [("hsdp", int(size), GB) for size in fitting.split(" or ")]
        for shard, size, weight in asked:
            placed = choose(shard, size, model(weight), launch)
            assert placed.pieces * placed.replicas == launch.world
            assert placed.pieces == {"auto": 1, "fsdp2": launch.world}.get(shard, size)


@pytest.mark.parametrize("world", range(1, 25))
def test_whatever_is_chosen_is_for_all_processes(world: int) -> None:
    """Of every launch, every word and every number; else it is refused in words."""
    placed: list[Placement] = []
    for local in range(1, world + 1):
        launch = Launch(world=world, local=local, device="cuda", free=79 * GB)
        for shard, weight in [("auto", GB), ("auto", 141 * GB), *((s, GB) for s in SHARDED)]:
            for size in (None, *range(1, world + 1)):
                with contextlib.suppress(InputError):
                    placed.append(choose(shard, size, model(weight), launch))  # type: ignore[arg-type]  # a word
    assert placed
    assert {found.pieces * found.replicas for found in placed} == {world}


SHARDED = ("replica", "fsdp2", "hsdp", "tp")


def test_a_quantised_checkpoint_may_travel() -> None:
    assert choose("auto", None, model(90 * GB, quantised=True), ONE).kind == "offload"


def test_what_is_told() -> None:
    placed = choose("auto", None, model(141 * GB), TWO)
    assert placed.describe(model(141 * GB)) == (
        "teacher m: 141.0 GB, hsdp, 17.6 GB on each of 8 processes x 2 copies (whole it would take "
        "more than half of 79.0 GB free on cuda)"
    )
    both = Placement("tp", fsdp=4, tp=2, reason="as asked")
    assert "0.1 GB on each of 2 x 4 processes (as asked)" in both.describe(model())
    assert Placement("replica", reason="as asked").describe(model(3_000_000)) == (
        "teacher m: 3.0 MB, replica (as asked)"
    )
