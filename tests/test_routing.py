"""Data that are routed are checked before weights load."""

import datasets
import pytest

from llm_distill import Ensemble, Local, Routed
from llm_distill.errors import InputError
from llm_distill.routing import check_routes
from tests import tiny

LLAMA, GPT2 = Local(tiny.llama("teacher")), Local(tiny.gpt2())
TEACHER = Routed({"1": LLAMA, "b": GPT2}, by="kind")


def test_every_split_and_every_router_is_looked_at() -> None:
    good, bad = datasets.Dataset.from_dict({"kind": ["1"]}), datasets.Dataset.from_dict({"x": [1]})
    check_routes(TEACHER, {"one": good}, "eval_dataset")
    with pytest.raises(InputError, match=r"eval_dataset\[two\] has no column 'kind'.*it has x"):
        check_routes(TEACHER, {"one": good, "two": bad}, "eval_dataset")
    with pytest.raises(InputError, match="x has no column 'kind'"):
        check_routes(Ensemble([LLAMA, TEACHER]), bad, "x")


def test_names_are_compared_as_text() -> None:
    check_routes(TEACHER, datasets.Dataset.from_dict({"kind": [1, 1]}), "x")
    check_routes(TEACHER, [{"kind": 1}, {"kind": "b"}], "x")
    with pytest.raises(InputError, match="x: column 'kind' names 2, and the experts are 1, b"):
        check_routes(TEACHER, [{"kind": 1}, {"kind": 2}], "x")


def test_what_cannot_be_read_twice_is_left_to_the_collator() -> None:
    stream = datasets.Dataset.from_dict({"kind": ["c"]}).to_iterable_dataset()
    check_routes(TEACHER, stream, "x")
    check_routes(TEACHER, None, "x")


def test_most_teachers_route_nothing() -> None:
    check_routes(LLAMA, datasets.Dataset.from_dict({"x": [1]}), "x")
