"""What is told to the user in one sentence, without a traceback."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input, found before weights load; the CLI exits 2."""


class OwnError(InputError):
    """Bad input that one process of several may have met alone."""


class ServerError(RuntimeError):
    """A server that was good at the start and is not any more; the CLI exits 1."""


_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback")


def sentence(error: Exception) -> str:
    """What an error says; of one that a DataLoader's worker met, without the traceback around it.

    torch raises such an error anew here, and its only argument is the text of the first one.

    >>> sentence(InputError("write another path"))
    'write another path'
    """
    text = str(error)
    found = _WORKER.match(text)
    if found is None:
        return text
    # The last line that begins with its type: what it says may have several lines.
    starts = [*re.finditer(rf"^(?:\w+\.)*{found[1]}: ", text, re.MULTILINE)]
    return text[starts[-1].end() :].strip() if starts else text


@contextmanager
def each_by_itself() -> Iterator[None]:
    """What is refused inside is known to this process, and perhaps to no other."""
    try:
        yield
    except InputError as error:
        raise OwnError(sentence(error)) from error
