"""Entries of a saved map; every bad one by its message is in test_map.py."""

from pathlib import Path

import pytest

from llm_distill.errors import InputError
from llm_distill.layers.entries import Entries


def entries(**document: object) -> Entries:
    return Entries(document, Path("map.yaml"))


def test_rows_come_with_their_place() -> None:
    given = entries(rows=[{"student": -1, "teacher": {5: "1e-1", -1: 0.9}, "weight": 2}])
    assert list(given.rows()) == [("map.yaml: rows[0]", -1, ((5, 0.1), (-1, 0.9)), 2.0)]


def test_what_is_left_out_has_a_default() -> None:
    given = entries(rows=[{"student": 1, "teacher": 2}])
    assert next(iter(given.rows()))[2:] == (((2, 1.0),), 1.0)
    assert given.text("origin", "mine") == "mine"
    assert given.switch("trained") is False
    assert given.figures("evidence") == ()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "nan", None, [], True])
def test_figures_are_finite(number: object) -> None:
    with pytest.raises(InputError, match=r"^map\.yaml: evidence\.a: .* is no finite number"):
        entries(evidence={"a": number}).figures("evidence")
