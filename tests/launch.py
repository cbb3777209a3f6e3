"""Starting test workers as one process or as two gloo ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(module: str, *arguments: str, ranks: int = 1, timeout: int = 180) -> str:
    """Run `python -m module`, under torchrun where there are ranks; what it printed.

    Raises:
        AssertionError: With the output, if it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    if ranks > 1:
        run = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
        command = [
            sys.executable,
            "-m",
            *run,
            "--rdzv_endpoint",
            "localhost:0",
            "-m",
            module,
            *arguments,
        ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
