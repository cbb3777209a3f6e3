"""The folder of a cache: where one may be written, and which files of a folder are a cache's."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from llm_distill.cache import frames
from llm_distill.cache.index import FILE as INDEX
from llm_distill.cache.manifest import FILE, UNFINISHED
from llm_distill.cache.store import HEAD, TEACHER, Store
from llm_distill.caching import lock
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import TrainingArguments

FIXED = frozenset({FILE, UNFINISHED, INDEX, HEAD, TEACHER, frames.FILE})
"""What a cache calls its files besides shards, their notes, and what is being written."""

BESIDE = frozenset({".json", ".txt", ".jinja", ".model", ".py"})
"""Suffixes of what configs and tokenizers save: anything else beside them is somebody's model."""

_NUMBERED = re.compile(r"(train|eval)-\d{5,}\.(parquet(\.json|\.part)?|part)")
_BEGUN = frozenset({f"{Path(name).stem}.part" for name in (FILE, UNFINISHED)})
_KEYS = {"format", "teacher", "keep", "shards"}


def check_place(path: str | Path, taken: Mapping[str, str]) -> None:
    """Refuse a path that is no folder, or a folder that models or data of the run are in.

    Args:
        path: Of the cache.
        taken: What else the run reads, by what it is: paths, or ids of the Hub.

    Raises:
        InputError: Saying which.
    """
    folder = Path(path).expanduser()
    for part in (folder, *folder.parents):
        if os.path.lexists(part) and not part.is_dir():
            raise InputError(
                f"Cached: path is {path}, and {part} is no folder; write the path of a folder of "
                "its own"
            )
    for what, other in taken.items():
        there = Path(other).expanduser()
        if there.exists() and _holds(folder, there):
            raise InputError(
                f"Cached: path is {path}, and {what} is there ({other}); a cache needs a folder of "
                f"its own: write another path, such as cache/{folder.resolve().name}"
            )


def check_beside(path: str | Path, what: str, other: str | Path) -> None:
    """Refuse a path in a folder whose other files would be taken for its own, or the reverse.

    Args:
        path: Of the cache.
        what: The folder is, in words.
        other: That folder.

    Raises:
        InputError: Saying which.
    """
    folder, there = Path(path).expanduser(), Path(other).expanduser()
    if _holds(there, folder) or _holds(folder / TEACHER, there):
        raise InputError(
            f"Cached: path is {path}, and {what} is {other}; these have to be two folders, none in "
            f"the other: write another path, such as cache/{folder.resolve().name}"
        )


def _check_content(folder: Path) -> None:
    """Refuse a folder that holds a file which no cache wrote, of a name that a cache writes.

    Raises:
        InputError: Naming some.
    """
    if not folder.is_dir():
        return
    own = ours(folder)
    strange = sorted(e.name for e in folder.iterdir() if _is_reserved(e.name) and e.name not in own)
    if TEACHER in own:
        strange += [str(file.relative_to(folder)) for file in _teachers(folder)[1]]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise InputError(
            f"{folder} holds {', '.join(strange[:3])}{more}, which no cache wrote, where a cache "
            "writes; write another path, or move them elsewhere"
        )


def ours(folder: Path) -> set[str]:
    """Names in a folder that a cache has there: all of an unfinished one, else what is listed."""
    finished, begun = (_told(folder / name) for name in (FILE, UNFINISHED))
    if begun is not None or (finished is None and lock.read(folder) is not None):
        return {entry.name for entry in folder.iterdir() if _is_reserved(entry.name)}
    if finished is None:
        return set()
    listed = (str(shard["file"]) for shard in finished["shards"])
    files = [name for name in listed if _NUMBERED.fullmatch(name)]  # none outside the folder
    kept = {HEAD: finished.get("head"), frames.FILE: finished.get("frames")}
    return {FILE, INDEX, TEACHER, *files, *(name for name, told in kept.items() if told)}


def check_folder(folder: Path, *, overwrite: bool) -> bool:
    """Refuse a folder that cannot be written to.

    Args:
        folder: Of the cache.
        overwrite: Whether a cache that is there may be lost.

    Returns:
        Whether there is a finished one that may not.

    Raises:
        InputError: If it holds files of others, a cache that is not whole, or a broken manifest.
    """
    if overwrite or FILE not in ours(folder):
        _check_content(folder)
        return False
    try:
        Store.open(folder).check_there()
    except InputError as error:
        raise InputError(f"{error}, or write it anew with --overwrite") from error
    return True


@contextmanager
def alone(folder: Path, args: TrainingArguments) -> Iterator[None]:
    """Write as the only launch; what was begun without a manifest is deleted at the end.

    Args:
        folder: To write into.
        args: Of all ranks, for which the first one takes the lock.

    Raises:
        InputError: On every rank, if another launch writes.
    """
    made, mine, refusal = not folder.exists(), None, [""]
    together(args)  # all have looked at the folder
    if args.process_index == 0:
        try:
            mine = lock.take(folder)
        except InputError as error:
            refusal = [str(error)]
    if args.world_size > 1:
        dist.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise InputError(refusal[0])
    try:
        yield
    finally:
        if mine is not None:
            if not _is_marked(folder):
                clear(folder)
            lock.release(folder, mine)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def together(args: TrainingArguments) -> None:
    """Wait for the other ranks."""
    state: Any = args.distributed_state
    if state is not None:
        state.wait_for_everyone()


def clear(folder: Path) -> None:
    """Delete what a cache has in a folder, the manifest first, and nothing else."""
    for name in sorted(ours(folder), key=lambda name: name != FILE):
        if name != TEACHER:
            (folder / name).unlink(missing_ok=True)
            continue
        for file in _teachers(folder)[0]:
            file.unlink()
        below = [path for path in (folder / name).rglob("*") if path.is_dir()]
        for path in (*sorted(below, reverse=True), folder / name):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _is_marked(folder: Path) -> bool:
    """Whether a manifest says that there is a cache, finished or not."""
    return any(_told(folder / name) is not None for name in (FILE, UNFINISHED))


def _holds(folder: Path, other: Path) -> bool:
    """Whether a folder is another one, or above it."""
    whole = other.resolve()
    return folder.resolve() in (whole, *whole.parents)


def _is_reserved(name: str) -> bool:
    """Whether a cache writes files of a name."""
    return name in FIXED or name in _BEGUN or _NUMBERED.fullmatch(name) is not None


def _teachers(folder: Path) -> tuple[list[Path], list[Path]]:
    """What lies where a cache puts the teacher's config and tokenizer: such files, and others."""
    top = folder / TEACHER
    if top.is_symlink() or not top.is_dir():
        return [], [top] if os.path.lexists(top) else []
    files = [path for path in sorted(top.rglob("*")) if path.is_symlink() or not path.is_dir()]
    own = [file for file in files if file.suffix in BESIDE and not file.is_symlink()]
    return own, [file for file in files if file not in own and not file.name.startswith(".")]


def _told(path: Path) -> Mapping[str, Any] | None:
    """What a manifest of any version says; None for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= _KEYS else None
