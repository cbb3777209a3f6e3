"""What is told to the user in one sentence, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input, found before weights load; the CLI exits 2."""


class OwnError(InputError):
    """Bad input that one process of several may have met alone."""


class ServerError(RuntimeError):
    """A server that was good at the start and is not any more; the CLI exits 1."""


@contextmanager
def each_by_itself() -> Iterator[None]:
    """What is refused inside is known to this process, and perhaps to no other."""
    try:
        yield
    except InputError as error:
        raise OwnError(str(error)) from error
