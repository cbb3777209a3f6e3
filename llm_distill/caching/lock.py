"""One launch at a time writes into a folder: a file there says which, as long as it does."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llm_distill.errors import InputError

FILE = "writing.lock"

TRIES = 20
"""Looks at a lock that comes and goes, or has no content yet."""

PAUSE = 0.05
"""Seconds between them."""

TOLERANCE = 60.0
"""Seconds by which the start of a process may seem to move, as the clock of the machine is set."""


@dataclass(frozen=True)
class Holder:
    """Who writes.

    Attributes:
        host: Its machine.
        pid: Of its first process.
        started: When that started, since numbers of processes come again.
        space: In which its number counts: containers of one machine may have the same host name.
    """

    host: str
    pid: int
    started: float
    space: str

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, psutil.Process(pid).create_time(), _space())

    @property
    def is_gone(self) -> bool:
        """Whether it has ended for sure: of other machines nobody knows."""
        if (self.host, self.space) != (socket.gethostname(), _space()):
            return False
        try:
            process = psutil.Process(self.pid)
            other = abs(process.create_time() - self.started) > TOLERANCE
            return bool(other or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def take(folder: Path) -> Holder:
    """Be the one that writes; the lock of a process that was killed is taken over.

    Args:
        folder: Is made where it is not there.

    Returns:
        What stands in the lock, for `release`.

    Raises:
        InputError: If another one writes, or nobody can.
    """
    path, mine = folder / FILE, Holder.me()
    for _ in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                json.dump(asdict(mine), file)
        except FileExistsError:
            there = read(folder)
            if there is not None and not there.is_gone:
                raise _taken(folder, there) from None
            if there is None:
                time.sleep(PAUSE)  # it is about to be written, or was just deleted
            else:
                _move_away(path, there)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); write another path"
            ) from error
        else:
            return mine
    raise InputError(
        f"{path} is no lock of a cache; if no llm-distill cache is writing there, delete it"
    )


def release(folder: Path, mine: Holder) -> None:
    """Let others write; only one's own lock is deleted."""
    if read(folder) == mine:
        (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> Holder | None:
    """Who writes, or was killed writing; None for nobody."""
    return _read(folder / FILE)


def _read(path: Path) -> Holder | None:
    """What stands in a lock; None where it is not there, or nothing yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _move_away(path: Path, gone: Holder) -> None:
    """Delete the lock of a process that ended, and of no other that came in its place just now."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # somebody else took it over
        return
    if _read(aside) == gone:
        aside.unlink()
    else:
        aside.rename(path)


def _taken(folder: Path, there: Holder) -> InputError:
    """Somebody writes."""
    here = there.host == socket.gethostname() and there.space == _space()
    where = "of this machine" if here else f"on {there.host}"
    way = (
        "wait until it has ended"
        if here
        else f"wait until it has ended, or delete {folder / FILE} if it runs no more"
    )
    return InputError(
        f"process {there.pid} {where} is writing a cache into {folder}; {way}, or write another "
        "path"
    )


def _space() -> str:
    """Of the numbers of processes, where the system tells."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
