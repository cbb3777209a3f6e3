import pytest

from llm_distill.errors import InputError, OwnError, ServerError, each_by_itself


def test_callers_that_expect_a_value_error_catch_it() -> None:
    with pytest.raises(ValueError, match="what is wrong"):
        raise InputError("what is wrong")


def test_a_server_that_dies_is_no_bad_input() -> None:
    assert not issubclass(ServerError, ValueError)


def test_what_one_process_meets_alone_is_bad_input_too() -> None:
    with pytest.raises(OwnError, match="my example"), each_by_itself():
        raise InputError("my example")
    assert issubclass(OwnError, InputError)
