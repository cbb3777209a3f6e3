"""Two processes race as one."""

import json
from pathlib import Path

import pytest

from tests.launch import launch


def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path) -> None:
    """Under DDP, where a rank that decided otherwise would wait for the others for ever."""
    for count in (1, 2):
        launch("tests.race_worker", str(tmp_path), ranks=count, timeout=280)
    one = json.loads((tmp_path / "1.0.json").read_text())
    ranks = [json.loads((tmp_path / f"2.{rank}.json").read_text()) for rank in range(2)]
    assert [one["world"], *(found["world"] for found in ranks)] == [1, 2, 2]
    assert ranks[0] == ranks[1]
    assert ranks[0]["winner"] == one["winner"]
    assert len(one["told"]) >= 9
    for ours, theirs in zip(one["told"], ranks[0]["told"], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)
