# ruff: noqa: E501  tables of cases
"""Student and teacher of a recipe: ids, specs, and code that has to be allowed."""

from typing import Any

import pytest

from llm_distill import AdapterOff, Ema, Ensemble, FromConfig, Local, Routed
from llm_distill.errors import InputError
from llm_distill.recipe import Recipe

CONTENT = {"student": "me/student", "teacher": "me/teacher", "data": {"path": "me/data"}}


def recipe(**changes: Any) -> Recipe:
    return Recipe.of({**CONTENT, **changes})


def test_ids_and_paths() -> None:
    made = recipe(student="./folder")
    assert made.student == Local("./folder")
    assert made.teacher == Local("me/teacher")


def test_specs() -> None:
    made = recipe(
        student={"FromConfig": {"architecture": "llama", "config": {"hidden_size": 32}}},
        teacher={"Local": {"model": "t", "dtype": "bfloat16", "tokenizer": "other"}},
    )
    assert made.student == FromConfig("llama", {"hidden_size": 32})
    assert made.teacher == Local("t", dtype="bfloat16", tokenizer="other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": ""}, "student is empty; write a Hub id, a path, Local, FromConfig or FromTeacher"),
        ({"student": 5}, "student: 5 is no component"),
        ({"student": "Logits"}, "student: 'Logits' is no student; write a Hub id"),
        ({"student": {"Data": {"path": "x"}}}, "student: 'Data' is no student"),
        ({"teacher": {"FromConfig": {"architecture": "llama"}}}, "'FromConfig' is no teacher"),
        ({"teacher": {"Local": {}}}, r"teacher\.Local: model is missing"),
        ({"teacher": {"Locl": {"model": "x"}}}, "teacher: no 'Locl' in llm_distill; did you mean 'Local'"),
        ({"teacher": {"Local": {"model": 3}}}, r"teacher\.Local\.model: 3 is not .* text"),
        ({"teacher": {"Local": {"model": "x", "dtyp": "auto"}}}, "Local has no 'dtyp'; did you mean 'dtype'"),
        ({"teacher": "my.teachers:Remote"}, "teacher: .* --allow-code my.teachers"),
        ({"student": {"subprocess:Popen": {"args": "true"}}}, "student: .* --allow-code subprocess"),
        ({"teacher": {"Local": {"model": "x/y", "trust_remote_code": True}}}, r"teacher\.Local\.trust_remote_code: code from the repository of x/y .* --allow-code x/y"),
        ({"student": {"Local": {"model": "x/y", "attn_implementation": "a/kernel"}}}, "'a/kernel' is a kernel from the Hub, .* --allow-code a/kernel"),
        ({"student": {"FromConfig": {"architecture": "llama", "config": {"_attn_implementation": "a/kernel"}}}}, "is a kernel from the Hub"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(**changes)


def test_code_from_the_hub_is_allowed_by_the_name_of_its_repository() -> None:
    teacher = {"Local": {"model": "x/y", "trust_remote_code": True}}
    made = Recipe.of({**CONTENT, "teacher": teacher}, allow_code=["x/y"])
    assert made.teacher == Local("x/y", trust_remote_code=True)


MEMBERS = {"Ensemble": {"members": ["a/b", {"Local": {"model": "c/d", "dtype": "bfloat16"}}]}}


def test_several_teachers() -> None:
    made = recipe(teacher={"Ensemble": {**MEMBERS["Ensemble"], "weights": [1, 2.5]}})
    assert made.teacher == Ensemble([Local("a/b"), Local("c/d", dtype="bfloat16")], [1.0, 2.5])
    nested = {"a": "a/b", "b": MEMBERS}
    made = recipe(teacher={"Routed": {"by": "kind", "experts": nested}})
    assert isinstance(made.teacher, Routed)
    assert made.teacher.names == ("a", "b")
    assert isinstance(made.teacher.teachers[1], Ensemble)


def test_a_member_by_its_name_alone() -> None:
    """As the teacher of a recipe is, and as `{Ema: }`; whether it can be one is said later."""
    for form in ("Ema", {"Ema": None}):
        several = {"Ensemble": {"members": ["a/b", form]}}
        routed = {"Routed": {"by": "kind", "experts": {"a": "a/b", "b": form}}}
        for teacher in (several, routed):
            made: Any = recipe(teacher=teacher).teacher
            assert made.teachers == (Local("a/b"), Ema())


def test_the_student_itself() -> None:
    assert recipe(teacher="AdapterOff").teacher == AdapterOff()
    assert recipe(teacher={"Ema": {"decay": 0.9}}).teacher == Ema(decay=0.9)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"Ensemble": {"members": ["a/b", "Logits"]}}, r"members\[1\]: 'Logits' is no teacher"),
        ({"Ensemble": {"members": ["a/b", " "]}}, r"members\[1\] is empty; write a Hub id"),
        ({"Ensemble": {"members": ["a/b", {"Logits": {}}]}}, r"members\[1\]: 'Logits' is no teacher"),
        ({"Ensemble": {"members": ["a/b", {"Local": {}}]}}, r"members\[1\]\.Local: model is missing"),
        ({"Ensemble": {"members": ["a/b"]}}, "are no several teachers"),
        ({"Ensemble": {"members": ["a/b", "c/d"], "weights": [1]}}, "1 weights for 2 members"),
        ({"Ensemble": {"members": ["a/b", {"Local": {"model": "x/y", "trust_remote_code": True}}]}}, "--allow-code x/y"),
        ({"Routed": {"experts": {"a": "a/b", "b": "c/d"}}}, "Routed: by is missing"),
        ({"Ema": {"decay": 1}}, "decay is 1.0; write a number from 0 up to 1"),
        ({"Ema": {"student": "a/b"}}, "Ema has no 'student'"),
    ],
)  # fmt: skip
def test_bad_teachers_have_their_place(teacher: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(teacher=teacher)
