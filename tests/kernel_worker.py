"""Compiles the row program for an H200, which needs no GPU, and writes what came out as JSON.

Usage: python -m tests.kernel_worker FILE   (with TRITON_INTERPRET unset)
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from llm_distill.losses.kernel_forms import FORMS
from llm_distill.losses.kernel_rows import program

VOCABULARY = 151_936
BLOCK = 2048


class Device:
    """What Triton asks of the driver before it compiles."""

    def get_current_target(self) -> object:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compiled(form: str | None, **settings: Any) -> dict[str, object]:
    """The program as assembly, for bf16 logits unless the settings say otherwise."""
    dtype = settings.pop("dtype", torch.bfloat16)
    cap, wide = settings.pop("cap", None), torch.float32
    given = {"total": None, "grad": True, "own": False, **settings}
    kernel = program.warmup(
        *(dtype, None if form is None else dtype, torch.int64, wide, wide, wide, wide, wide),
        *(VOCABULARY, VOCABULARY, 0, 0, VOCABULARY, VOCABULARY),
        *(1.0, 1.0, cap, 1.0, cap, 0.5, 0.0, 1.0),
        **{"form": None if form is None else FORMS[form], **given},
        block=BLOCK,
        num_warps=BLOCK // 256,
        grid=(1,),
    )
    assembly = kernel.asm["ptx"]
    return {
        "form": form,
        **{name: str(value) for name, value in settings.items()},
        "dtype": str(dtype),
        "loads": len(re.findall(r"ld\.global\.v4\.b32", assembly)),
        "doubles": assembly.count("f64"),
        "rough_logs": assembly.count("lg2.approx"),
        "binary": len(kernel.asm["cubin"]),
    }


def main(file: Path) -> None:
    """Every form, and the branches they share."""
    triton.runtime.driver.set_active(Device())
    programs = [
        *(compiled(form) for form in FORMS),
        compiled("forward_kl", total=-1.0),
        compiled("jsd", own=True, cap=30.0, dtype=torch.float32),
        compiled("jsd", grad=False, dtype=torch.float16),
        compiled(None, own=True),
    ]
    file.write_text(json.dumps(programs), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
