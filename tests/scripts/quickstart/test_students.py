from __future__ import annotations

from pathlib import Path

import pytest

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits
from llm_distill.recipe import Recipe
from llm_distill.students import FromConfig
from scripts._quickstart import students
from scripts._quickstart.settings import RECIPE, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(output=tmp_path / "a folder: [x]", seed=7, steps=11, teacher_steps=3)


def test_the_distilled_student_has_all_three_signals(settings: Settings) -> None:
    recipe = students.read_recipe(students.DISTILLED, settings)
    kinds = {type(objective) for objective in recipe.objectives}
    assert kinds == {CrossEntropy, Logits, HiddenStates, AttentionMaps}


def test_the_twin_differs_in_objectives_and_folder_only(settings: Settings) -> None:
    distilled, twin = (
        students.read_recipe(name, settings) for name in (students.DISTILLED, students.TWIN)
    )
    assert twin.objectives == (CrossEntropy(),)
    assert (twin.student, twin.teacher, twin.data) == (
        distilled.student,
        distilled.teacher,
        distilled.data,
    )
    folders = dict(twin.training).pop("output_dir"), dict(distilled.training).pop("output_dir")
    assert folders == (str(settings.student("twin")), str(settings.student("distilled")))
    assert {k: v for k, v in twin.training.items() if k != "output_dir"} == {
        k: v for k, v in distilled.training.items() if k != "output_dir"
    }


def test_settings_reach_the_recipe(settings: Settings) -> None:
    recipe = students.read_recipe(students.DISTILLED, settings)
    assert isinstance(recipe.student, FromConfig)
    assert recipe.student.seed == recipe.training["seed"] == 7
    assert recipe.training["max_steps"] == 11
    assert recipe.data.path == str(settings.train_text)
    assert recipe.data.eval == str(settings.eval_text)


def test_default_settings_are_the_recipe_itself() -> None:
    shipped = Recipe.load(RECIPE)
    asked = Settings(output=Path("out/quickstart"), seed=0, steps=300, teacher_steps=1)
    made = students.read_recipe(students.DISTILLED, asked)
    assert (made.student, made.teacher, made.data, made.objectives) == (
        shipped.student,
        shipped.teacher,
        shipped.data,
        shipped.objectives,
    )
    extra = {"seed": 0, "disable_tqdm": False}
    assert dict(made.training) == {**shipped.training, **extra}
