"""What may be asked of a teacher's placement, before anything is known of launch or model."""

from __future__ import annotations

from typing import Literal, get_args

from llm_distill.errors import InputError

Shard = Literal["auto", "replica", "fsdp2", "hsdp", "tp", "zero3"]
"""What may be asked for."""

SHARDS: tuple[str, ...] = get_args(Shard)
"""The same, as words."""


def check_spec(shard: str, size: int | None, device_map: object, *, loaded: bool) -> None:
    """Refuse what is no word, and pieces that nobody could make.

    Raises:
        InputError: With the words there are, or what to leave out.
    """
    if shard not in SHARDS:
        raise InputError(f"Local: shard is {shard!r}; write one of {', '.join(SHARDS)}")
    if shard == "auto" and size is None:
        return
    if loaded:
        raise InputError(
            f"Local: shard={shard!r} is for models that are loaded here, piece by piece, and this "
            "one is loaded; give its id or path"
        )
    if device_map is not None:
        raise InputError(
            f"Local: shard={shard!r} and device_map={device_map!r} both say where the weights go; "
            "leave one of them out"
        )
