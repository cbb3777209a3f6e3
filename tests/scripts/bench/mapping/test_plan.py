"""What is done in which order, from made-up results."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from scripts.bench.mapping.jobs import Job, Lines, rows_of
from scripts.bench.mapping.plan import DATA, HAND, Plan
from tests.scripts.bench.mapping.conftest import ROWS, finish, made_up

if TYPE_CHECKING:
    from scripts.bench.mapping.settings import Settings

BEST = {"skip": 3.0, "last": 10.0}
"""Weights that are best; 1 for the others."""


def name_of(job: Job) -> str:
    """Of the map."""
    rows = {rows_of(entry): name for name, entry in reversed(ROWS.items())}
    return rows.get(job.mapping, "") if job.mapping else "none"


def kl(job: Job) -> float:
    """`skip` wins, at weight 3; every seed is a little worse than the one before."""
    name = name_of(job)
    off = abs(math.log(job.weight / BEST.get(name, 1.0))) if job.weight else 0.0
    return (0.9 if name == "skip" else 1.0) + 0.01 * off + 0.001 * job.seed


@pytest.fixture
def plan(settings: Settings, lines: Lines) -> Plan:
    return Plan(settings, "a", lines)


def test_models_then_maps_then_weights(plan: Plan) -> None:
    assert plan.pending() == [Job("a", "models")]
    plan.lines.add(*_done(Job("a", "models")))
    assert plan.pending() == [Job("a", "maps", seed) for seed in range(8)]
    for job in plan.pending():
        plan.lines.add(*_done(job))
    jobs = plan.pending()
    assert {job.seed for job in jobs if job.mapping} == {0, 1}
    assert {job.weight for job in jobs if job.mapping} == {0.3, 1.0, 3.0, 10.0}
    assert sum(job.mode == "race" for job in jobs) == 8


def test_everything_is_done_once(plan: Plan) -> None:
    finish(plan, kl)
    assert plan.pending() == []
    keys = [line["key"] for line in plan.lines.every()]
    assert len(keys) == len(set(keys))


def test_equal_maps_are_trained_once(plan: Plan) -> None:
    for job in (Job("a", "models"), *(Job("a", "maps", seed) for seed in range(8))):
        line = made_up(job, kl)
        if job.kind == "maps":
            line["maps"] = line["maps"] | {"auto": line["maps"]["coverage"]}
        plan.lines.add(job, line)
    assert plan.job("auto", 0, 1.0) == plan.job("coverage", 0, 1.0)


def test_the_best_weight_is_that_of_the_tuning_seeds(plan: Plan) -> None:
    finish(plan, kl)
    assert plan.best_weight("skip") == 3.0
    assert plan.best_weight("last") == 10.0
    assert plan.best_weight("uniform") == 1.0
    assert plan.best_hand() == "skip"
    assert plan.best_map() == "skip"


def test_larger_weights_are_tried_as_long_as_the_largest_is_the_best(plan: Plan) -> None:
    finish(plan, lambda job: kl(replace(job, weight=job.weight / 3 if is_last(job) else 0)))
    assert plan.weights_of("last") == (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    assert plan.best_weight("last") == 30.0
    assert plan.weights_of("uniform") == (0.3, 1.0, 3.0, 10.0)


def is_last(job: Job) -> bool:
    return name_of(job) == "last"


def test_what_weights_are_tried_changes_no_line(settings: Settings) -> None:
    assert replace(settings, wider=()).digest("a") == settings.digest("a")
    assert replace(settings, weights=(1.0,)).digest("a") != settings.digest("a")


def test_other_seeds_do_not_choose_the_weight(plan: Plan) -> None:
    finish(plan, lambda job: kl(job) + (5.0 if job.seed > 1 and job.weight == 1.0 else 0.0))
    assert plan.best_weight("uniform") == 1.0


def test_a_weight_that_failed_is_not_chosen(plan: Plan) -> None:
    finish(plan, kl)
    job = plan.job("uniform", 0, 1.0)
    assert job is not None
    plan.lines.add(job, made_up(job, kl) | {"kl": None})
    assert plan.best_weight("uniform") == 3.0


def test_seeds(plan: Plan) -> None:
    finish(plan, kl)
    assert len(plan.seeds("segmentation")) == len(plan.seeds("auto_race")) == 8
    assert len(plan.seeds("skip")) == 8  # the best by hand
    assert len(plan.seeds("reverse")) == len(plan.seeds("cka")) == 3
    assert len(Plan(plan.settings, "a", plan.lines, seeds=2).seeds("none")) == 2


def test_studies(plan: Plan) -> None:
    finish(plan, kl)
    longer = plan.study("best hand at race cost", 0)
    assert longer is not None
    assert longer.steps == plan.settings.steps + 100
    assert name_of(longer) == "skip"
    shipped = plan.study("best hand as shipped", 7)
    assert shipped is not None
    assert (name_of(shipped), shipped.mode, shipped.weight) == ("skip", "shipped", 3.0)
    assert len(plan.seeds("best hand as shipped")) == 8
    alone = plan.study("blockwise", 2)
    assert alone is not None
    assert alone.blockwise == pytest.approx(1 / 3)
    assert alone.seed == 2
    assert len(plan.drawn()) == 4
    assert {job.seed for job in plan.drawn().values()} == {0}
    assert {choice for choice, _, _ in plan.blocks()} == {"ends", "uniform", "first", "last"}
    assert len(plan.blocks()) == 4 * 2 * 3


def test_blocks_are_chosen_where_students_are_cut(settings: Settings, lines: Lines) -> None:
    other = Plan(settings, "b", lines)
    assert other.blocks() == {}


def test_only_arms_that_were_asked_for(settings: Settings, lines: Lines) -> None:
    plan = Plan(settings, "a", lines, ("none", "last"), 2)
    finish(plan, kl)
    runs = [job for job in lines.every() if job["kind"] == "run"]
    # none on 2 seeds, last at 4 weights on 2 seeds, and at 30, since 10 was the best
    assert len(runs) == 2 + 10


def test_how_much_there_is_to_do(plan: Plan) -> None:
    finish(plan, kl)
    runs = [line for line in plan.lines.every() if line["kind"] == "run"]
    assert 180 < len(runs) < 260
    assert len(HAND) + len(DATA) == 15


def _done(job: Job) -> tuple[Job, dict[str, Any]]:
    return job, made_up(job, kl)


def test_settings_have_folders_of_their_own(settings: Settings) -> None:
    assert settings.digest("a") != replace(settings, steps=1).digest("a")
    assert settings.digest("a") != replace(settings, text=1).digest("a")
    assert settings.digest("a") != settings.digest("b")
    fewer = replace(settings, pairs=settings.pairs[:1])
    assert settings.digest("a") == fewer.digest("a")  # other pairs do not count
