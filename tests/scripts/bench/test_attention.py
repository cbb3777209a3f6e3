"""`attention` on small models: every arm trains for the same as autograd in one piece."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from scripts.bench import peak
from scripts.bench.attention import eager
from scripts.bench.models import Models
from scripts.bench.run import execute
from scripts.bench.settings import LENGTHS, AttentionSettings

if TYPE_CHECKING:
    from scripts.bench.report import Report


def small(**changes: object) -> AttentionSettings:
    given = {
        "batch": 2,
        "length": 24,
        "vocab": 96,
        "queries": 8,
        "student_layers": 2,
        "student_width": 64,
        "teacher_layers": 3,
        "teacher_width": 128,
        "rounds": 1,
        "memory": False,
    }
    return AttentionSettings(**given | changes)  # type: ignore[arg-type]  # names with their values


def reported(**changes: object) -> Report:
    return execute("attention", small(**changes), ["attention"], lambda text: None)


@pytest.mark.parametrize("loss", ["map_kl", "map_mse"])
def test_all_arms_compute_the_same_as_one_piece(loss: str) -> None:
    report = reported(loss=loss)
    verdicts = {result.name: report.verdict(result) for result in report.results}
    assert set(verdicts.values()) == {"same"}
    assert list(verdicts) == [
        "no maps",
        "1 layer, 8 rows",
        "2 layers, 8 rows",
        "1 layer, all rows",
        "relations, 1 layer, 8 rows",
        "1 layer, all rows, one piece",
        "eager, no maps",
        "eager with output_attentions, 1 layer",
    ]
    losses = {result.name: result.loss for result in report.results}
    assert len({round(loss, 6) for loss in losses.values() if loss}) >= 5


def test_ratios_are_of_the_step_without_maps() -> None:
    report = reported(arms=("no maps", "1 layer, 8"))
    base = report.result("no maps")
    assert base is not None
    assert base.times is not None
    assert report.denominator("x no maps") == (base.times.least, base.times.middle)
    assert "logits_mib" not in report.facts
    assert report.facts["map_mib"] > 0


def test_one_report_for_each_length() -> None:
    assert [part.length for part in AttentionSettings().parts()] == list(LENGTHS)
    assert AttentionSettings(length=64).parts() == (AttentionSettings(length=64),)


def test_a_loss_that_compares_no_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="no loss of maps 'forward_kl'; there are map_kl, map_mse"):
        reported(loss="forward_kl")


def test_eager_attention_lasts_as_long_as_it_is_asked_for() -> None:
    models = Models.build(small())
    before = models.student.config._attn_implementation
    with eager(models):
        maps = models.student.model(input_ids=models.ids, output_attentions=True).attentions
    assert len(maps) == 2
    assert torch.allclose(maps[-1].sum(-1), torch.ones(()))
    assert models.student.config._attn_implementation == before != "eager"


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_all_rows_in_blocks_need_less_than_one_piece() -> None:
    settings = small(length=512, batch=1)
    arms = "1 layer, all rows", "1 layer, all rows, one piece"
    ours, whole = (peak.of("attention", settings, arm).used for arm in arms)
    assert ours < whole
