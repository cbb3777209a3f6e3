from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Optional

import pytest

from llm_distill.errors import InputError
from llm_distill.recipe.values import Place, convert, did_you_mean, kind_of, wanted

Color = Enum("Color", {"RED": "red", "BLUE": "blue"})


def made(value: Any, hint: Any, place: Place) -> Any:
    return ("made", value, place.field)


def converted(value: Any, hint: Any) -> Any:
    return convert(value, hint, Place("training.x", "x"), made)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3.0, int, 3),
        ("1e3", int, 1000),
        (3, float, 3.0),
        ("1e-5", float, 1e-5),
        ("1.5E+2", float, 150.0),
        (True, bool, True),
        ("text", str, "text"),
        (None, int | None, None),
        (None, Optional[str], None),  # noqa: UP045  both spellings are met
        (3, int | None, 3),
        ("0.05", str | float | None, "0.05"),
        (0.05, str | float | None, 0.05),
        ("test", str | float | None, "test"),
        ("T", Literal["none", "T"], "T"),
        (False, str | None | Literal[False], False),
        ("red", Color | str, "red"),
        ([1, 2.0], list[int], [1, 2]),
        ([[1, 2], [3, 4]], Sequence[Sequence[int]], [[1, 2], [3, 4]]),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ({"a": "1e-1"}, Mapping[str, float], {"a": 0.1}),
        ({"a": [1]}, dict, {"a": [1]}),
        ({"a": 1}, dict | str | None, {"a": 1}),
        ({"a": {"b": 1}}, Any, {"a": {"b": 1}}),
        ("q_proj", str | list[str] | None, "q_proj"),
        (["q_proj"], str | list[str] | None, ["q_proj"]),
        (2, float | Callable[[float], float], 2.0),
        ("1e-1", float | Callable[[float], float], 0.1),
        ("linear", float | Callable[[float], float], ("made", "linear", "x")),
        ({"linear": {}}, float | Callable[[float], float], ("made", {"linear": {}}, "x")),
    ],
)
def test_values_become_what_the_hint_says(value: Any, hint: Any, expected: Any) -> None:
    got = converted(value, hint)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (3.5, int, "3.5 is not what this takes; write an integer"),
        (True, int, "write an integer"),
        (True, float, "write a number"),
        (1, bool, "write true or false"),
        ("yes", bool, "'yes' is not what this takes; write true or false"),
        ("high", float, "'high' is not what this takes; write a number"),
        ("nan", float, "write a number"),
        (float("nan"), float, "nan is not finite"),
        (float("inf"), float | None, "inf is not finite"),
        (1e5, str, "write text, in quotes: '100000.0'"),
        ([1], str, "write text"),
        ("a", list[str], "write a list"),
        ([1, "b"], list[int], r"x\[1\]: 'b' is not"),
        ([1], tuple[int, int], "has 1 entries; write 2"),
        ({"a": "b"}, Mapping[str, int], r"x\.a: 'b' is not"),
        ("T3", Literal["none", "T2"], "one of none, T2"),
        ("rad", Color | str, "one of red, blue; did you mean 'red'"),
        (None, int, "None is not what this takes; write an integer"),
        ([1], int | None, "write an integer or null"),
        (True, float | Callable[[float], float], "write a number or a name"),
        ([1], dict | str | None, "write a mapping or text or null"),
    ],
)
def test_other_values_are_refused_with_the_place(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^training\.x.*{message}|^training\.{message}"):
        converted(value, hint)


def test_words_for_types() -> None:
    assert kind_of(Callable) == "function"
    assert wanted(Color) == "one of red, blue"
    assert wanted(dict[str, int] | Callable[[int], int]) == "a mapping or a name"


def test_did_you_mean_ignores_case_and_far_words() -> None:
    assert did_you_mean("logits", ["Logits", "CrossEntropy"]) == "; did you mean 'Logits'?"
    assert did_you_mean("zzz", ["Logits"]) == ""
