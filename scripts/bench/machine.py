"""Where a benchmark ran: processor, versions, matrix library, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.bench.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "liger-kernel",
    "distillkit",
    "triton",
    "numpy",
)
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
# Large enough that no library takes a shortcut for small matrices.
PROBE = """
import torch
torch.set_num_threads(1)
a, b = torch.ones(256, 512, dtype=torch.{dtype}), torch.ones(512, 4096, dtype=torch.{dtype})
torch.mm(a, b)
"""


@dataclass(frozen=True)
class Machine:
    """Where and how.

    Attributes:
        processor: Its name, cores, and the extensions that matter to GEMMs.
        memory_gib: Of the machine.
        gpu: Its name; None on a CPU.
        system: Operating system and Python.
        load: Jobs that wanted to run in the last minute, when the benchmark started.
        backend: The library that ran the GEMMs.
        versions: Of the packages; those that are not installed are left out.
        command: That was given.
        commit: Of this repository, with `+` where files had changed; None outside of git.
        started: UTC.
    """

    processor: str
    memory_gib: float
    gpu: str | None
    system: str
    load: float
    backend: str
    versions: dict[str, str]
    command: str
    commit: str | None
    started: str

    @classmethod
    def here(cls, settings: Settings, argv: Sequence[str]) -> Machine:
        """This one, now."""
        import torch

        cuda = settings.device == "cuda"
        return cls(
            processor=_processor(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            gpu=torch.cuda.get_device_name() if cuda else None,
            system=f"{platform.platform()}, Python {platform.python_version()}",
            load=os.getloadavg()[0],
            backend=_cublas() if cuda else cpu_backend(settings.dtype),
            versions=versions(),
            command=" ".join(["python -m scripts.bench", *argv]),
            commit=_commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def described() -> str:
    """Processor, system and commit in one line."""
    system = f"{platform.platform()}, Python {platform.python_version()}"
    return f"{_processor()}; {system}; commit {_commit() or 'not told'}"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_backend(dtype: str) -> str:
    """The library that multiplies matrices here, as it says itself in another process."""
    verbose = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(dtype=dtype)],
        env=os.environ | verbose,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in run.stdout.splitlines():
        fields = line.split(",")
        if "exec" in fields and "matmul" in fields:
            return f"oneDNN {fields[fields.index('matmul') + 1]}"
        if line.startswith("MKL_VERBOSE") and "GEMM" in line:
            return f"MKL {line.split()[1].partition('(')[0]}"
    return "not told"


def _cublas() -> str:
    """CUDA's, with the switch that changes what fp32 means."""
    import torch

    return f"cuBLAS of CUDA {torch.version.cuda}, fp32 {torch.get_float32_matmul_precision()}"


def _processor() -> str:
    """Name, cores and extensions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = [extension for extension in EXTENSIONS if extension in flags]
    return ", ".join([name, f"{os.cpu_count()} cores", *known])


def _commit() -> str | None:
    """The commit of the repository."""
    asked = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
    try:
        commit, changed = (
            subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
