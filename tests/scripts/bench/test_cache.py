"""The benchmark of caches, on next to nothing."""

from pathlib import Path

import pytest
import torch

from scripts.bench import __main__ as command
from scripts.bench import cache

SMALL = "cache --vocab 300 --length 20 --examples 2 --repeats 2 --width 16 --rounds 1"


@pytest.mark.usefixtures("alone")
def test_table_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = tmp_path / "RESULTS.md"
    assert command.main([*SMALL.split(), "--markdown", str(section)]) == 0
    shown = capsys.readouterr().out
    text = section.read_text()
    for kind in ("top 50 and the tail", "top 64", "50 draws", "top 8 and 42 draws", "last hidden"):
        assert kind in shown
        assert kind in text
    (dense,) = [
        line for line in text.splitlines() if line.startswith("| dense logits, bf16 | 600 |")
    ]
    mean, most = (float(cell) for cell in dense.split(" | ")[2:4])
    assert 1e-7 < mean < most < 1e-3
    for kind in ("a scale for a token", "ours, all features", "ours, 8 directions"):
        assert kind in shown
        assert f"| {kind} |" in text
    assert f"python -m scripts.bench {SMALL} --markdown" in text


def test_lines_are_measured() -> None:
    options = command.parser().parse_args(SMALL.split())
    lines = {line.name: line for line in cache.measure(options, lambda text: text)}
    top, states = lines["top 50 and the tail"], lines["last hidden states"]
    assert 50 < top.size < 300  # footers weigh in a file of 80 rows
    assert 0 < top.told["kl"] < 2e-5
    assert states.told["kl"] == 0
    assert all(speed > 0 for line in lines.values() for speed in line.speeds)


def test_rows_are_steep_and_in_no_order() -> None:
    torch.manual_seed(0)
    made = cache.rows(200, 1000)
    assert made.argmax(-1).unique().numel() > 100
    p = made.softmax(-1)
    assert p.amax(-1).max() > 0.5 > p.amax(-1).min()
