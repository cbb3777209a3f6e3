"""Processes and the machines they run on: which numbers of them can share a copy."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from llm_distill.errors import InputError


@dataclass(frozen=True)
class Launch:
    """How this run was started.

    Attributes:
        world: Processes.
        local: Processes on a machine, on the one that has most.
        device: `cuda`, `cpu`, …, where each process trains.
        free: Bytes that the device of the fullest process could still give.
        deepspeed: Whether it is a run of DeepSpeed.
        divisor: Largest number that divides the processes of each machine, where that is known.
    """

    world: int = 1
    local: int = 1
    device: str = "cpu"
    free: int = 0
    deepspeed: bool = False
    divisor: int | None = None

    @property
    def nodes(self) -> int:
        """Machines, as far as they have the same number of processes."""
        return max(1, self.world // max(1, self.local))

    @property
    def common(self) -> int:
        """The largest number that divides the processes of each machine, as far as is known.

        >>> Launch(world=16, local=8).common, Launch(world=12, local=8).common
        (8, 4)
        """
        return gcd(self.local if self.divisor is None else self.divisor, self.world)

    @property
    def even(self) -> bool:
        """Whether all machines have the same number of processes."""
        return self.common == self.local


def check_size(shard: str, size: int | None, name: str, launch: Launch) -> None:
    """Refuse a number that the processes cannot be divided by, or that crosses machines."""
    least = 2 if shard == "hsdp" else 1  # copies
    fitting = [str(n) for n in range(2, launch.world // least + 1) if _fits(n, launch)]
    sizes = f"write shard_size: {' or '.join(fitting)}, or" if fitting else "write"
    if size is None and not launch.even:
        raise InputError(
            f"teacher {name}: shard={shard!r} shares it inside each machine, and "
            f"{uneven(launch)}; start the same number on every machine, {sizes} shard: fsdp2"
        )
    shared = launch.local if size is None else size
    if shared < 2 or launch.world % shared:
        raise InputError(
            f"teacher {name}: shard={shard!r} with {shared} of {launch.world} processes to a "
            f"copy; {sizes} shard: fsdp2"
        )
    if not _fits(shared, launch):
        there = f"{launch.local} on each machine"
        there = there if launch.even else f"each machine, as {uneven(launch)}"
        raise InputError(
            f"teacher {name}: {shared} processes to a copy do not fit {there}; {sizes} shard: fsdp2"
        )


def _fits(size: int, launch: Launch) -> bool:
    """Whether copies on so many processes each lie inside machines, or on whole ones."""
    inside = launch.common % size == 0
    whole = launch.even and size % launch.local == 0
    return launch.world % size == 0 and (inside or whole)


def uneven(launch: Launch) -> str:
    """What is wrong with machines of different sizes."""
    return f"{launch.world} processes are not {launch.local} on each machine"


def check_copies(copies: int, name: str, launch: Launch) -> None:
    """Refuse HSDP with one copy, which is another kind."""
    if copies == 1:
        raise InputError(
            f"teacher {name}: shard='hsdp' keeps a copy on each machine and there is one "
            f"machine with {launch.world} processes; write shard: fsdp2, or a smaller shard_size"
        )
