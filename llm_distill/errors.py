"""What is told to the user in one sentence, without a traceback."""


class InputError(ValueError):
    """Bad input, found before weights load; the CLI exits 2."""


class ServerError(RuntimeError):
    """A server that was good at the start and is not any more; the CLI exits 1."""
