"""A `device_map` where several processes run: each loads a copy of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_distill.errors import InputError
from llm_distill.placement.choice import SHARE, Placement
from llm_distill.placement.launch import processes

if TYPE_CHECKING:
    from llm_distill.placement.machines import Launch

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that transformers makes itself, from what it may take of each place."""

APART = frozenset({"cpu", "disk"})
"""Where copies of several processes are in nobody's way: what is on disk is read from the
checkpoint's own files, and nothing is written."""


def is_word(device_map: object) -> bool:
    """Whether transformers decides where each part goes."""
    return isinstance(device_map, str) and device_map in WORDS


def check_device_map(
    device_map: str | Mapping[str, Any] | None, name: str, *, quantised: bool
) -> None:
    """Refuse a map that would put the copies of several processes on one GPU.

    Args:
        device_map: What was asked for.
        name: Of the teacher, for messages.
        quantised: Whether it is quantised as it loads.

    Raises:
        InputError: With the places that are taken, and what to write instead.
    """
    world, _ = processes()
    if device_map is None or world == 1:
        return
    asked = f"teacher {name}: device_map={device_map!r} with {world} processes"
    if is_word(device_map):
        if quantised:
            raise InputError(
                f"{asked} may leave parts in memory or on disk, and quantised weights stay on the "
                "device; leave device_map out: each process has a whole copy on its own"
            )
        return
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    taken = sorted({str(place) for place in places} - APART)
    if taken:
        raise InputError(
            f"{asked} would put every process's copy on the same {', '.join(taken)}; write "
            "device_map: auto, which spreads each copy over its process's own device, memory and "
            "disk, name cpu and disk alone, or start one process"
        )


def own_places(word: str, launch: Launch) -> Placement:
    """Over this process's device, as far as the student leaves room, its memory and its disk."""
    reason = f"device_map: {word}, for each of {launch.world} processes on its own"
    return Placement("offload", replicas=launch.world, room=int(SHARE * launch.free), reason=reason)
