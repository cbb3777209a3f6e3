"""How this process was started, as the launchers say it."""

from __future__ import annotations

import os
from math import gcd

import psutil
import torch
import torch.distributed as dist

from llm_distill import zero
from llm_distill.placement.machines import Launch


def launched(device: torch.device) -> Launch:
    """Processes, and what the fullest of their devices could still give.

    A collective where there are several processes: every one of them gets the same answer.

    Args:
        device: Of this process.
    """
    world, local = processes()
    divisor: int | None = None
    free = free_bytes(device) // (local if device.type == "cpu" else 1)
    if world > 1 and dist.is_initialized():
        own = torch.tensor([free, local], device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        every = torch.stack(found)
        free, local = int(every[:, 0].min()), int(every[:, 1].max())
        divisor = gcd(*every[:, 1].tolist())
    return Launch(world, local, device.type, free, zero.is_running(), divisor)


def processes() -> tuple[int, int]:
    """Of this run, and of it on this machine."""
    found = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    world, local = map(int, found)
    return world, local


def free_bytes(device: torch.device) -> int:
    """Bytes that a device could still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def caps(device: torch.device, room: int) -> dict[int | str, int] | None:
    """`max_memory` of a model that lies on a device, in memory and on disk.

    Args:
        device: Of this process.
        room: Bytes of it that the model may take.

    Returns:
        None for one process without CUDA: it has the memory that is all there is before the disk.
    """
    world, local = processes()
    if device.type != "cuda":
        return None if world == 1 else {"cpu": room}
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {index: room, "cpu": free_bytes(torch.device("cpu")) // local}
