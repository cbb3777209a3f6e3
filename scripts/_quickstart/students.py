"""The distilled student and its twin: one recipe, which for the twin has cross-entropy alone."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from scripts._quickstart.settings import RECIPE

if TYPE_CHECKING:
    from llm_distill.recipe import Recipe
    from scripts._quickstart.settings import Settings

DISTILLED = "distilled"
TWIN = "twin"


def read_recipe(name: str, settings: Settings) -> Recipe:
    """The recipe of a student: the same weights to begin with, the same data in the same order."""
    from llm_distill.recipe import Recipe

    changes: dict[str, object] = {
        "student.FromConfig.seed": settings.seed,
        "teacher": {"Local": {"model": str(settings.teacher)}},
        "data.path": str(settings.train_text),
        "data.eval": str(settings.eval_text),
        "training.output_dir": str(settings.student(name)),
        "training.max_steps": settings.steps,
        "training.seed": settings.seed,
        "training.disable_tqdm": False,  # Bars, although transformers logs errors only.
    }
    if name == TWIN:
        changes["objectives"] = ["CrossEntropy"]
    # Overrides are YAML, and JSON is YAML in which no path means anything else.
    return Recipe.load(RECIPE, [(key, json.dumps(value)) for key, value in changes.items()])


def show(settings: Settings) -> None:
    """Print what the distilled student will learn, and which of its layers from which."""
    from llm_distill.cli.console import Screen
    from llm_distill.cli.plan import plan

    recipe = read_recipe(DISTILLED, settings)
    planned = plan(recipe, recipe.arguments())
    screen = Screen(speaks=True)
    screen.models(planned.student, planned.teacher)
    screen.objectives(recipe.objectives, planned.terms)


def train(name: str, settings: Settings) -> dict[str, float]:
    """Train and save a student as `llm-distill run` does; the metrics of its evaluation.

    What `run` prints goes to a log beside the other files, since the table at the end says it
    again; progress bars are shown.
    """
    from llm_distill.cli.run import run

    log = settings.output / f"{name}.log"
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file):
        return run(read_recipe(name, settings), overwrite=True)
