from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from llm_distill.errors import InputError, OwnError, ServerError, each_by_itself, sentence


def test_callers_that_expect_a_value_error_catch_it() -> None:
    with pytest.raises(ValueError, match="what is wrong"):
        raise InputError("what is wrong")


def test_a_server_that_dies_is_no_bad_input() -> None:
    assert not issubclass(ServerError, ValueError)


def test_what_one_process_meets_alone_is_bad_input_too() -> None:
    with pytest.raises(OwnError, match="my example"), each_by_itself():
        raise InputError("my example")
    assert issubclass(OwnError, InputError)


class Broken(Dataset[Any]):
    """Data that cannot be had, for a reason of two lines."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> Any:
        try:
            raise KeyError("a")
        except KeyError as error:
            raise InputError("a: is missing;\n  write it anew") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_of_a_worker_the_sentence_alone(workers: int) -> None:
    with pytest.raises(InputError) as raised:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert ("Traceback" in str(raised.value)) == bool(workers)
    assert sentence(raised.value) == "a: is missing;\n  write it anew"


def test_what_only_looks_like_it() -> None:
    text = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback is gone"
    assert sentence(InputError(text)) == text
    assert sentence(FloatingPointError("nan")) == "nan"
