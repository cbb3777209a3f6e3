import re

import pytest

from llm_distill.data import Data
from llm_distill.errors import InputError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 1}, "data.max_length: 1 is less than 2; a row needs a token to predict"),
        ({"limit": 0}, "data.limit: 0 is less than 1; write null for all examples"),
        ({"num_proc": 0}, "data.num_proc: 0 is less than 1; write null for one process"),
        ({"eval": 1.5}, "data.eval: 1.5 is no fraction; write a number between 0 and 1, such as"),
        ({"eval": 0}, "data.eval: 0 is no fraction"),
        (
            {"eval": 0.1, "streaming": True},
            "data.eval: 0.1 of a stream cannot be held out, since its length is unknown; write a "
            "split (eval: test) or a path (eval: held_out.jsonl), or streaming: false",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Data(**fields)  # type: ignore[arg-type]  # a recipe gives them by name


def test_errors_name_the_path_or_say_that_there_is_none() -> None:
    assert Data(path="me/corpus").where == "'me/corpus'"
    assert Data().where == "the dataset"
