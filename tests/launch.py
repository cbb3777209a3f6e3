"""Starting test workers as one process or as two gloo ranks, and ending them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

ROOT = Path(__file__).parent.parent


def launch(module: str, *arguments: str, ranks: int = 1, timeout: int = 180) -> str:
    """Run `python -m module`, under torchrun where there are ranks; what it printed.

    Raises:
        AssertionError: With the output, if it fails.
    """
    done = completed(module, *arguments, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def completed(
    module: str, *arguments: str, ranks: int = 1, timeout: int = 180
) -> subprocess.CompletedProcess[str]:
    """The same, however it ends."""
    command = [sys.executable, "-m", module, *arguments]
    if ranks > 1:
        run = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
        command = [sys.executable, "-m", *run, "-m", module, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def from_all(own: Any) -> list[Any]:
    """What every rank has to say, in their order; a collective."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def finish() -> NoReturn:
    """End a worker once all its ranks are done.

    Without Python's own teardown: gloo's threads sometimes abort in it ("terminate called without
    an active exception"), after all work is done and written.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
