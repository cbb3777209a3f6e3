"""The row program as a GPU's compiler sees it; what it computes is tested in `test_kernels`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # A process of its own: in this one Triton interprets.
    folder = tmp_path_factory.mktemp("triton")
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernel_worker", folder / "programs.json"],
        cwd=ROOT,
        env={**given, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads((folder / "programs.json").read_text("utf-8"))
    return found


def test_every_form_compiles_for_hopper(programs: list[dict[str, Any]]) -> None:
    from llm_distill.losses.kernel_forms import FORMS

    assert {program["form"] for program in programs} == {*FORMS, None}
    assert all(program["binary"] > 0 for program in programs)


def test_rows_are_read_in_16_bytes_and_no_more_often_than_said(
    programs: list[dict[str, Any]],
) -> None:
    for program in programs:
        models = 1 if program["form"] is None else 2
        once_known = program["form"] is None or "total" in program
        passes = 2 if once_known or program.get("grad") == "False" else 3
        width = 2 if program["dtype"] == "torch.float32" else 1
        assert program["loads"] == passes * models * width, program


def test_nothing_is_computed_in_double_or_with_rough_logarithms(
    programs: list[dict[str, Any]],
) -> None:
    # A Python number that became a double would cost more than all the rest. The rough logarithm
    # has an absolute error near 1, where `_log_mixture` needs a relative one.
    assert [p for p in programs if p["doubles"] or p["rough_logs"]] == []
