"""Peak memory of one arm, run once in a process of its own.

`python -m scripts.bench.peak` reads a request from its standard input and answers with JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.settings import KINDS

if TYPE_CHECKING:
    from scripts.bench.arms import Arm, Benchmark
    from scripts.bench.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 65536
"""Bytes above which glibc gives freed memory back at once: else the second tensor looks free."""


@dataclass(frozen=True)
class Peak:
    """Memory of one run, above what was in use before it. MiB.

    Attributes:
        used: VmHWM - VmRSS on a CPU, what tensors took on a GPU.
        reserved: What the allocator took from the driver; None on a CPU.
    """

    used: float
    reserved: float | None = None


def of(benchmark: str, settings: Settings, arm: str) -> Peak:
    """Run an arm in a fresh process.

    Raises:
        RuntimeError: With what the process wrote, if it failed.
    """
    request = {"benchmark": benchmark, "settings": settings.to_json(), "arm": arm}
    limits = {"MALLOC_MMAP_THRESHOLD_": str(LIMIT), "MALLOC_TRIM_THRESHOLD_": str(LIMIT)}
    run = subprocess.run(
        [sys.executable, "-m", "scripts.bench.peak"],
        input=json.dumps(request),
        cwd=ROOT,
        env=os.environ | limits | {"OMP_NUM_THREADS": str(settings.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{arm}: the process of its peak failed\n{run.stderr}")
    return Peak(**json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    """Answer one request."""
    from scripts.bench.run import quiet, start

    quiet()
    request: dict[str, Any] = json.loads(sys.stdin.read())
    settings = KINDS[request["benchmark"]].from_json(request["settings"])
    # Imports, threads and libraries are not the arm's: it has run before, on next to nothing.
    _find(start(settings.tiny()), request["arm"]).make()()
    benchmark = start(settings)
    peak = measured(benchmark, _find(benchmark, request["arm"]))
    sys.stdout.write(json.dumps(asdict(peak)) + "\n")


def _find(benchmark: Benchmark, name: str) -> Arm:
    """The arm of a name."""
    return next(arm for arm in benchmark.arms() if arm.name == name)


def measured(benchmark: Benchmark, arm: Arm) -> Peak:
    """Run an arm once in this process."""
    import torch

    run = arm.make()
    if arm.twice:
        run()
    _warm(benchmark)
    benchmark.forget()
    gc.collect()
    if benchmark.settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        used, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        run()
        torch.cuda.synchronize()
        return Peak(
            (torch.cuda.max_memory_allocated() - used) / 2**20,
            (torch.cuda.max_memory_reserved() - reserved) / 2**20,
        )
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM := VmRSS
    run()
    return Peak(_status("VmHWM") - before)


def _warm(benchmark: Benchmark) -> None:
    """Let the libraries behind a GEMM allocate the buffers they pack operands into, and keep."""
    import torch

    dtype: torch.dtype = vars(torch)[benchmark.settings.dtype]
    h = torch.ones(256, 512, device=benchmark.settings.device, dtype=dtype)
    w = torch.ones(4096, 512, device=benchmark.settings.device, dtype=dtype)
    z = h @ w.T
    (z @ w).sum().item()
    (z.T @ h).sum().item()


def _status(name: str) -> float:
    """A field of the kernel's account of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
