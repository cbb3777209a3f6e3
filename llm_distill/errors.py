"""The one exception that means "the input is wrong"."""


class InputError(ValueError):
    """Bad input, found before weights load; the CLI exits 2."""
