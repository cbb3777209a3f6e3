"""`Encoder`: a batch of rows, in any accepted format, to ``input_ids`` and ``labels``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from transformers import PreTrainedTokenizerBase

from llm_distill.data.chat import Chat
from llm_distill.data.encode import (
    EMPTY,
    IGNORE,
    BadRow,
    Example,
    after,
    common,
    encode_ids,
    encode_text,
    string,
    tokenize,
    with_end,
)
from llm_distill.data.report import Counter, Counts
from llm_distill.errors import InputError

Kind: TypeAlias = Literal["input_ids", "messages", "pairs", "chat pairs", "text"]
Row: TypeAlias = Mapping[str, object]
Columns: TypeAlias = Mapping[str, Sequence[object]]
T = TypeVar("T")


class Encoded(TypedDict):
    """A batch of examples, as columns."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    truncated: list[int]
    supervised: list[int]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Rows to tokens: a function for `map`, with all that it depends on as fields.

    `datasets` finds an earlier result by a hash of these fields.

    Args:
        tokenizer: Gives the tokens.
        kind: The format of the rows.
        text: The column, where the format is text.
        max_length: Where to cut, in tokens.
        supervise_all: Supervise prompts, and what others than the assistant say, too.
        template: The chat template to use in place of the tokenizer's.
        where: How errors name the data.
        version: To be raised when the same rows shall give other tokens, for the hash.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    text: str
    max_length: int | None
    supervise_all: bool
    template: str | None
    where: str
    version: int = 1

    def __call__(self, columns: Columns, numbers: Sequence[int]) -> Encoded:
        """Encode a batch; `numbers` are the numbers of its rows, for errors.

        Returns:
            One entry per row. ``truncated`` is 0 or 1; ``supervised`` is the number of tokens that
            are predicted, and 0 says that the example is of no use.
        """
        examples = self._encode(columns, numbers)
        kept = [Example(e.ids[: self.max_length], e.labels[: self.max_length]) for e in examples]
        return {
            "input_ids": [example.ids for example in kept],
            "labels": [example.labels for example in kept],
            "truncated": [
                int(len(cut.ids) < len(example.ids))
                for example, cut in zip(examples, kept, strict=True)
            ],
            # The first token of an example has no token before it to be predicted from.
            "supervised": [sum(label != IGNORE for label in e.labels[1:]) for e in kept],
        }

    def _encode(self, columns: Columns, numbers: Sequence[int]) -> list[Example]:
        match self.kind:
            case "input_ids":
                return self._each(encode_ids, columns, numbers)
            case "text":
                return encode_text(self.tokenizer, self._each(self._text, columns, numbers))
            case "messages":
                return self._conversations(columns, numbers)
            case "chat pairs":
                examples = self._each(self._chat_pair, columns, numbers)
            case "pairs":
                examples = self._pairs(self._each(_pair, columns, numbers))
        return [after(0, e.ids) for e in examples] if self.supervise_all else examples

    def _text(self, row: Row) -> str:
        return string(row[self.text], self.text)

    def _conversations(self, columns: Columns, numbers: Sequence[int]) -> list[Example]:
        chat = Chat.of(self.tokenizer, self.template)
        if self.supervise_all:
            return chat.whole(
                self._each(lambda r: chat.render(r["messages"], r.get("tools")), columns, numbers)
            )
        return chat.turns(
            self._each(lambda r: chat.marked(r["messages"], r.get("tools")), columns, numbers)
        )

    def _chat_pair(self, row: Row) -> Example:
        chat = Chat.of(self.tokenizer, self.template)
        return chat.completion(row["prompt"], row["completion"], row.get("tools"))

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Example]:
        starts = tokenize(self.tokenizer, [prompt for prompt, _ in pairs])
        wholes = tokenize(self.tokenizer, [prompt + completion for prompt, completion in pairs])
        # Where the tokens of the prompt alone and of the whole part, the completion begins: a
        # token merged of both belongs to it.
        return [
            after(common(start, ids), with_end(ids, self.tokenizer)) if completion else EMPTY
            for (_, completion), start, ids in zip(pairs, starts, wholes, strict=True)
        ]

    def _each(
        self, encode: Callable[[Row], T], columns: Columns, numbers: Sequence[int]
    ) -> list[T]:
        results = []
        for place, number in enumerate(numbers):
            try:
                results.append(encode({name: column[place] for name, column in columns.items()}))
            except BadRow as fault:
                raise InputError(
                    f"row {number:,} of {self.where} (counted from 0): {fault}"
                ) from fault
        return results


@dataclass(frozen=True, kw_only=True)
class StreamEncoder:
    """An encoder for a stream: leaves out what is of no use, and counts.

    Args:
        encoder: Encodes.
        counter: Counts.
        keep: Columns that stay, as text.
    """

    encoder: Encoder
    counter: Counter
    keep: tuple[str, ...] = ()

    def __call__(self, columns: Columns, numbers: Sequence[int]) -> dict[str, Any]:
        """Encode a batch to the ``input_ids`` and ``labels`` of the examples that are of use."""
        encoded = self.encoder(columns, numbers)
        self.counter.add(count(encoded))
        kept = [place for place, tokens in enumerate(encoded["supervised"]) if tokens]
        return {
            "input_ids": [encoded["input_ids"][place] for place in kept],
            "labels": [encoded["labels"][place] for place in kept],
            **{name: [str(columns[name][place]) for place in kept] for name in self.keep},
        }


def count(encoded: Encoded) -> Counts:
    """Count the examples and tokens of a batch."""
    kept = [ids for ids, n in zip(encoded["input_ids"], encoded["supervised"], strict=True) if n]
    return Counts(
        examples=len(encoded["input_ids"]),
        truncated=sum(encoded["truncated"]),
        dropped=len(encoded["input_ids"]) - len(kept),
        tokens=sum(map(len, kept)),
        supervised_tokens=sum(encoded["supervised"]),
    )


def _pair(row: Row) -> tuple[str, str]:
    return string(row["prompt"], "prompt"), string(row["completion"], "completion")
