"""The table of what large teachers take and move, against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench import __main__ as command
from scripts.bench.placement import SHAPES, Run, Size, chosen, config_of, table

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def llama() -> Size:
    return Size.of(config_of(SHAPES["Llama-3.1-70B"]))


def test_sizes_are_those_that_were_published(llama: Size) -> None:
    width, hidden, kv = 8192, 28_672, 1024
    block = 2 * width * width + 2 * width * kv + 3 * width * hidden + 2 * width
    assert llama.block == block
    assert llama.head == 128_256 * width
    assert llama.parameters == 80 * block + 2 * llama.head + width == 70_553_706_496


def test_what_is_held_and_moved(llama: Size) -> None:
    run = Run(processes=8, tokens=4096)
    assert llama.in_pieces(run) == llama.whole / 8 + 2 * (2 * llama.block + llama.head)
    assert llama.gathered(run) == pytest.approx(llama.whole * 7 / 8)
    # Two sums in each block of the states of everyone; a ring moves 2 (N - 1) / N of what it sums.
    states = 8 * 4096 * 8192 * 2
    assert llama.summed(run) == pytest.approx(80 * 2 * (2 * 7 / 8) * states)
    even = Run(processes=8, tokens=round(llama.even(run)))
    assert llama.summed(even) == pytest.approx(llama.gathered(even), rel=1e-3)


def test_one_process_moves_nothing(llama: Size) -> None:
    assert llama.gathered(Run(processes=1)) == llama.summed(Run(processes=1)) == 0
    assert chosen(llama, Run(processes=1)) == "offload"


def test_the_readme_shows_this_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table(Run())) in readme


@pytest.mark.usefixtures("alone")
def test_table_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = tmp_path / "RESULTS.md"
    argv = ["placement", "--processes", "4", "--markdown", str(section)]
    assert command.main(argv) == 0
    assert "4 GPUs of 80 GB" in section.read_text()
    assert capsys.readouterr().out.strip() in section.read_text()
