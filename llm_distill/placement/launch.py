"""How this process was started, as the launchers say it."""

from __future__ import annotations

import os

import psutil
import torch
import torch.distributed as dist

from llm_distill import zero
from llm_distill.placement.choice import Launch


def launched(device: torch.device) -> Launch:
    """Processes, and what the fullest of their devices could still give.

    A collective where there are several processes: every one of them gets the same answer.

    Args:
        device: Of this process.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("LOCAL_WORLD_SIZE", "1")
    free = free_bytes(device) // (int(local) if device.type == "cpu" else 1)
    if world > 1 and dist.is_initialized():
        least = torch.tensor(free, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        free = int(least)
    return Launch(world, int(local), device.type, free, deepspeed=zero.is_running())


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
        None but for CUDA: others share the memory that is all there is before the disk.
    """
    if device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {index: room, "cpu": free_bytes(torch.device("cpu"))}
