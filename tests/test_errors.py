import pytest

from llm_distill.errors import InputError


def test_callers_that_expect_a_value_error_catch_it() -> None:
    with pytest.raises(ValueError, match="what is wrong"):
        raise InputError("what is wrong")
