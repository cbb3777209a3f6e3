"""Text files as one stream of tokens, cut into blocks."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from llm_distill.data.encode import tokenize
from llm_distill.data.files import not_utf8

_PIECE = 1 << 20  # Characters tokenised at a time: enough for the whole speed, little memory.
_VERSION = 1  # To be raised when the same files shall give other blocks, for the hash.
_FEATURES = Features({"input_ids": List(Value("int32"))})


def block_dataset(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    streaming: bool,
    limit: int | None,
) -> Dataset | IterableDataset:
    """Blocks of `length` tokens in a column ``input_ids``.

    Args:
        files: Text files in UTF-8, one after the other.
        tokenizer: Gives the tokens.
        length: Tokens in a block.
        streaming: Read while training.
        limit: At most this many blocks. A stream ignores it: its reader stops when it likes.
    """
    # A tuple: of a list, `datasets` would make a stream for each file, each with an end cut short.
    arguments = {"files": tuple(files), "tokenizer": tokenizer, "length": length}
    if streaming:
        return IterableDataset.from_generator(_rows, _FEATURES, gen_kwargs=arguments)
    # `datasets` finds an earlier result by a hash of the arguments: a changed file must change it.
    stats = [Path(file).stat() for file in files]
    arguments["key"] = (_VERSION, *((stat.st_mtime_ns, stat.st_size) for stat in stats))
    return Dataset.from_generator(_rows, _FEATURES, gen_kwargs={**arguments, "limit": limit})


def blocks(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[list[int]]:
    """Cut the tokens of all files into blocks; the last one holds what is left.

    A file ends with the end of sequence. Every block begins with what the tokenizer puts at the
    beginning by itself (Gemma's models are lost without), and this counts in its length.
    """
    start = _beginning(tokenizer)
    room = length - len(start)
    held: list[int] = []
    for file in files:
        for tokens in _tokens(file, tokenizer):
            held += tokens
            whole = len(held) // room * room
            for begin in range(0, whole, room):
                yield start + held[begin : begin + room]
            del held[:whole]
    if held:
        yield start + held


def _rows(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
    key: object = None,
) -> Iterator[dict[str, list[int]]]:
    del key  # It is there for the hash.
    for block in islice(blocks(files, tokenizer, length), limit):
        yield {"input_ids": block}


def _tokens(file: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    empty = True
    for piece in _pieces(file):
        tokens = tokenize(tokenizer, [piece], special=False)[0]
        empty = empty and not tokens
        yield tokens
    if not empty and tokenizer.eos_token_id is not None:
        yield [tokenizer.eos_token_id]


def _pieces(file: str) -> Iterator[str]:
    with Path(file).open(encoding="utf-8-sig") as lines:
        try:
            while piece := lines.read(_PIECE):
                yield piece + lines.readline()
        except UnicodeDecodeError as error:
            raise not_utf8(file, error) from error


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    plain = tokenize(tokenizer, ["a"], special=False)[0]
    special = tokenize(tokenizer, ["a"])[0]
    extra = len(special) - len(plain)
    return next((special[:n] for n in range(extra + 1) if special[n:][: len(plain)] == plain), [])
