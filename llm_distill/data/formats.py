"""Which format a dataset has, by its columns, and the encoder for it."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from llm_distill.data.chat import Chat
from llm_distill.data.encoder import Encoder, Kind
from llm_distill.data.files import read_text_file
from llm_distill.data.spec import Data
from llm_distill.errors import InputError

_NEEDS: dict[Kind, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "pairs": ("prompt", "completion"),
}
_TAKES: dict[Kind, tuple[str, ...]] = {
    "input_ids": ("labels", "attention_mask"),
    "messages": ("tools",),
    "chat pairs": ("tools",),
}
_ACCEPTED = (
    "'text' (or the column that data.text names), 'prompt' + 'completion', 'messages', or "
    "'input_ids' (+ 'labels')"
)


def open_encoder(
    first: Mapping[str, object],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Encoder:
    """The encoder for the rows that are like the first one.

    Raises:
        InputError: If there is no such format, or if the tokenizer lacks something for it.
    """
    kind = _kind(first, data)
    template = None if data.chat_template is None else read_text_file(data.chat_template)
    if kind in ("messages", "chat pairs"):
        chat = Chat.of(tokenizer, template)
        if kind == "messages" and data.assistant_only:
            chat.check_marks()
    return Encoder(
        tokenizer=tokenizer,
        kind=kind,
        text=data.text,
        max_length=max_length,
        supervise_all=not (data.assistant_only if kind == "messages" else data.completion_only),
        template=template,
        where=data.where,
    )


def used_columns(encoder: Encoder, columns: Sequence[str]) -> list[str]:
    """The columns that an encoder reads, of those there are."""
    needed = _NEEDS.get("pairs" if encoder.kind == "chat pairs" else encoder.kind, (encoder.text,))
    wanted = (*needed, *_TAKES.get(encoder.kind, ()))
    return [column for column in columns if column in wanted]


def nothing_supervised(encoder: Encoder) -> str:
    """Why examples of a format may have nothing supervised, and what to write then."""
    length = encoder.max_length
    longer = f", or cut off at data.max_length {length}: write a larger one" if length else ""
    if encoder.kind == "input_ids":
        return f"the labels are all -100{longer}"
    if encoder.kind == "messages" and encoder.supervise_all:
        return "the conversations are empty"
    if encoder.kind == "messages":
        return f"no turn has the role 'assistant' in a way that the chat template knows{longer}"
    if encoder.kind == "text":
        return f"column '{encoder.text}' has nothing but empty or single-token texts"
    return f"the completions are empty{longer}"


def _kind(first: Mapping[str, object], data: Data) -> Kind:
    if data.text != "text":
        if data.text not in first:
            raise InputError(
                f"data.text: {data.where} has no column '{data.text}'; it has {_names(first)}"
            )
        return "text"
    for kind, needed in _NEEDS.items():
        if all(column in first for column in needed):
            chat = kind == "pairs" and isinstance(first["prompt"], list)
            return "chat pairs" if chat else kind
    if "text" in first:
        return "text"
    raise InputError(f"{data.where} has the columns {_names(first)}; accepted are {_ACCEPTED}")


def _names(columns: Mapping[str, object]) -> str:
    return ", ".join(f"'{column}'" for column in columns)
