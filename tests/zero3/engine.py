"""Where DeepSpeed lies for these tests, and launches that end whatever becomes of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".zero3"

needs_deepspeed = pytest.mark.skipif(
    not (FOLDER / ".complete").exists(),
    reason="DeepSpeed is not here; `bash scripts/setup.sh zero3` installs it into .zero3",
)


def launch(*command: str, ranks: int = 2, timeout: int = 600) -> str:
    """Run a module on gloo processes, by torchrun or by Accelerate; what was printed.

    Args:
        command: `-m` and a module with its arguments, for torchrun; or a module that launches, with
            its arguments.
        ranks: Processes, where torchrun starts them.
        timeout: Seconds after which the launch and all its processes are killed.

    Raises:
        AssertionError: With the output, if it fails or does not end.
    """
    for lock in FOLDER.glob("extensions/*/lock"):
        lock.unlink()  # of a launch that was killed: every later one would wait for it
    if command[0] == "-m":
        run = ("torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone")
        command = (*run, *command)
    environment = os.environ | {
        "PATH": f"{FOLDER / 'site' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER / 'site'}",
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "extensions"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            told, _ = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            told, _ = running.communicate()
            raise AssertionError(f"not done after {timeout} s: {told[-6000:]}") from None
    assert running.returncode == 0, told[-8000:]
    return str(told)
