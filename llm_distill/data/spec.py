"""`Data`: the ``data:`` section of a recipe."""

from dataclasses import dataclass

from llm_distill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on, and how its rows become tokens and labels.

    Args:
        path: A Hub id, a local file (.txt, .jsonl, .json, .parquet) or a folder of such files.
            None for a dataset that is in memory already.
        name: The configuration of a Hub dataset (or of a local copy of one).
        split: The split to train on. The files of a folder are sorted into splits by their
            names, as `datasets` does; a single file is all ``train``.
        revision: The branch, tag or commit of a Hub dataset.
        eval: What to evaluate on: a fraction in (0, 1) to hold out, a split of the same dataset
            (a bare word: ``test``), or a path (it has a slash or a suffix: ``./held_out``).
        text: The column of plain text.
        max_length: Tokens per example: longer ones are cut. None: as many as both models have
            positions for.
        streaming: Read rows as they are needed, in the order they come. Nothing is shuffled.
        assistant_only: ``messages``: supervise the assistant's turns, not the whole conversation.
        completion_only: ``prompt`` + ``completion``: supervise the completion, not the prompt.
        chat_template: A Jinja file to use in place of the tokenizer's own chat template. The
            tokenizer keeps its own: this is for reading the data.
        limit: At most this many examples are read, of the training and of the evaluation data.
        num_proc: Processes that tokenise. None: this one.
        keep: Columns that stay beside the tokens. Those that a teacher reads (`Routed: by`) stay
            by themselves.
        shuffle_seed: Which examples a fraction in ``eval`` holds out.

    Raises:
        InputError: If a number is out of its range.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    eval: str | float | None = None
    text: str = "text"
    max_length: int | None = 1024
    streaming: bool = False
    assistant_only: bool = True
    completion_only: bool = True
    chat_template: str | None = None
    limit: int | None = None
    num_proc: int | None = None
    shuffle_seed: int = 0
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least("max_length", self.max_length, 2, "a row needs a token to predict from")
        _at_least("limit", self.limit, 1, "write null for all examples")
        _at_least("num_proc", self.num_proc, 1, "write null for one process")
        if isinstance(self.eval, int | float) and not 0 < self.eval < 1:
            raise InputError(
                f"data.eval: {self.eval} is no fraction; write a number between 0 and 1, such as "
                "0.05, or a split or a path"
            )
        if self.streaming and isinstance(self.eval, float):
            raise InputError(fraction_of_stream(self.eval))

    @property
    def where(self) -> str:
        """How errors name this data."""
        return "the dataset" if self.path is None else f"'{self.path}'"


def fraction_of_stream(fraction: float) -> str:
    """Say why a stream has no fraction, and what to write instead."""
    return (
        f"data.eval: {fraction} of a stream cannot be held out, since its length is unknown; write "
        "a split (eval: test) or a path (eval: held_out.jsonl), or streaming: false"
    )


def _at_least(field: str, value: int | None, least: int, why: str) -> None:
    if value is not None and value < least:
        raise InputError(f"data.{field}: {value} is less than {least}; {why}")
