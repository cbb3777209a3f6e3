"""The benchmark from its command line to its report, on models that learn nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from llm_distill.layers import LayerEvidence, Similarity
from scripts.bench import __main__ as command
from scripts.bench.mapping import models, runs
from scripts.bench.mapping.arms import decided, drawn
from scripts.bench.mapping.jobs import Job
from scripts.bench.mapping.settings import PAIRS, Settings

if TYPE_CHECKING:
    from pathlib import Path

QUICK = Settings().quick()


def start(text: Path, work: Path, *more: str) -> int:
    """`--quick` on pair a, in this process."""
    given = ["mapping", "--quick", "--jobs", "0", "--pair", "a", "--seeds", "2"]
    return command.main([*given, "--text", str(text), "--work", str(work), *more])


def written(work: Path) -> list[dict[str, Any]]:
    """The lines."""
    (path,) = work.glob("*/results.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_end_to_end_and_resumption(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, arms = tmp_path / "work", ("--arms", "none,last")
    assert start(text, work, *arms) == 0
    found = written(work)
    runs_ = [line for line in found if line["kind"] == "run"]
    # none on 2 seeds; last at 2 weights on 1 seed, and on another at the best
    assert len(runs_) == 2 + 2 + 1
    for line in runs_:
        mean = sum(line["documents"]) / len(line["documents"])
        assert mean == pytest.approx(line["kl"], rel=1e-3)

    def refuse(*args: object) -> None:
        raise AssertionError("a finished job was done again")

    monkeypatch.setattr(runs, "do", refuse)
    assert start(text, work, *arms) == 0
    assert written(work) == found
    path = tmp_path / "MAPPING.md"
    assert start(text, work, *arms, "--report", "--to", str(path)) == 0
    assert "| **last** | 2←4 |" in path.read_text()


def test_what_fails_is_told_and_tried_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(runs, "do", fail)
        assert start(text, tmp_path / "work", "--arms", "none") == 1
    assert "RuntimeError: no luck" in capsys.readouterr().err
    assert start(text, tmp_path / "work", "--arms", "none") == 0


def test_a_text_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path / "none.txt", tmp_path) == 1
    assert "there is no text" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--arms", "nonsense"], ["--seeds", "0"], ["--jobs", "-1"]])
def test_what_cannot_be_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["mapping", *arguments])


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_a_hint_of_weight_0_is_no_hint(pair: str, text: Path, tmp_path: Path) -> None:
    """Arms are paired: same data order, same first weights, whatever else draws random numbers."""
    work = str(tmp_path)
    runs.do(Job(pair, "models"), QUICK, str(text), work)
    rows = ((1, ((2, 1.0),)), (2, ((4, 1.0),)))
    none = Job(pair, "run", 1, steps=4)
    found = [
        runs.do(job, QUICK, str(text), work)["kl"]
        for job in (none, replace(none, mapping=rows), replace(none, seed=2))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-6)


def test_maps_of_a_calibration(text: Path, tmp_path: Path) -> None:
    long = replace(QUICK, length=32)
    runs.do(Job("a", "models"), long, str(text), str(tmp_path))
    line = runs.do(Job("a", "maps"), long, str(text), str(tmp_path))
    assert line["maps"]["uniform"] == [[1, [[2, 1.0]]], [2, [[4, 1.0]]]]
    assert line["maps"]["auto"] == line["maps"]["coverage"]
    assert line["maps"]["provenance"] == [[1, [[3, 1.0]]], [2, [[4, 1.0]]]]
    assert len(line["similarity"]) == 5
    assert sum(name.startswith("drawn") for name in line["maps"]) == 3  # there are no more


@pytest.mark.slow
def test_a_race_tells_who_won_and_what_it_took(text: Path, tmp_path: Path) -> None:
    longer = replace(QUICK, steps=200, weights=(1.0,))
    runs.do(Job("a", "models"), longer, str(text), str(tmp_path))
    line = runs.do(Job("a", "run", steps=200, mode="race"), longer, str(text), str(tmp_path))
    assert 100 < line["race_steps"] <= 200
    assert line["winner"]["weight"] in (0.0, 1.0)
    assert line["kl"] > 0


def test_drawn_maps_rise_to_the_last_layer() -> None:
    found = drawn(4, 12, 20)
    assert len({tuple(pairs) for pairs in found}) == 20
    for pairs in found:
        ends = [t for _, t in pairs]
        assert ends == sorted(set(ends))
        assert ends[-1] == 12


def test_provenance_is_left_out_for_students_that_were_not_cut() -> None:
    alike = torch.eye(5)
    cross = Similarity(alike[:3], 0.01 * alike[:3])
    evidence = LayerEvidence(Similarity(alike, 0.01 * alike), cross)
    assert "provenance" not in decided(2, 4, evidence, 2)


def test_blocks_of_a_student(tmp_path: Path) -> None:
    pair, settings = PAIRS["a"], Settings()
    for choice, blocks in {"ends": (1, 4, 8, 12), "last": (9, 10, 11, 12)}.items():
        made: Any = models.student(pair, settings, tmp_path, choice, 0)
        assert made.blocks(12) == blocks
    with pytest.raises(ValueError, match="no choice of blocks 'nonsense'"):
        models.student(pair, settings, tmp_path, "nonsense", 0)
