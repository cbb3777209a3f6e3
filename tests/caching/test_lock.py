"""One writer at a time; that of a dead process does not stop the next."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_distill.caching import lock
from llm_distill.caching.lock import Holder
from llm_distill.errors import InputError


def write(folder: Path, **changes: Any) -> Holder:
    """A lock of this process, or of another one."""
    made = replace(Holder.me(), **changes)
    (folder / lock.FILE).write_text(json.dumps(asdict(made)))
    return made


def ended() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_taken_and_released(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    mine = lock.take(folder)
    assert lock.read(folder) == mine == Holder.me()
    lock.release(folder, mine)
    assert lock.read(folder) is None
    assert list(folder.iterdir()) == []
    lock.release(folder, mine)


def test_another_process_writes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        there = write(tmp_path, pid=other.pid, started=started)
        with pytest.raises(InputError, match=rf"process {other.pid} of this machine is writing"):
            lock.take(tmp_path)
        other.communicate(b"\n")
    assert lock.read(tmp_path) == there


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"space": "of a container"}])
def test_another_machine_writes_as_far_as_is_known(tmp_path: Path, changes: dict[str, str]) -> None:
    """Although a process of that number ended here."""
    write(tmp_path, pid=ended(), **changes)
    host = changes.get("host", socket.gethostname())
    with pytest.raises(InputError, match=rf"on {host} is writing .* delete .*{lock.FILE} if it"):
        lock.take(tmp_path)


@pytest.mark.parametrize("changes", [{"pid": True}, {"started": 1.0}])
def test_a_dead_writer_is_taken_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where its number is that of another process now."""
    write(tmp_path, **({"pid": ended()} if "pid" in changes else changes))
    assert lock.take(tmp_path) == Holder.me() == lock.read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    write(tmp_path, pid=process.pid)
    lock.take(tmp_path)
    process.wait()


def test_of_two_that_take_over_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second saw the dead one too, and finds the lock of the first in its place."""
    dead = write(tmp_path, pid=ended())
    first = write(tmp_path)
    seen = [first, dead]
    monkeypatch.setattr(lock, "read", lambda _: seen.pop())
    with pytest.raises(InputError, match="is writing a cache"):
        lock.take(tmp_path)


def test_only_ones_own_is_released(tmp_path: Path) -> None:
    other = write(tmp_path, host="elsewhere")
    lock.release(tmp_path, Holder.me())
    assert lock.read(tmp_path) == other


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\xff"])
def test_what_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(lock, "PAUSE", 0)
    (tmp_path / lock.FILE).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="is no lock of a cache; if no llm-distill cache"):
        lock.take(tmp_path)
    assert lock.read(tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\); write another"):
        lock.take(tmp_path / "cache")
