"""Conversations, rendered by a chat template: which characters, then which tokens, to supervise."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llm_distill.data.encode import EMPTY, IGNORE, BadRow, Example, after, common, tokenize
from llm_distill.errors import InputError

Message: TypeAlias = Mapping[str, object]
Spans: TypeAlias = Sequence[tuple[int, int]]

# transformers says that this returns a string.
_render = cast("Callable[..., tuple[list[str], list[Spans]]]", render_jinja_template)
# What transformers itself looks for.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer with the template that renders its conversations.

    Args:
        tokenizer: Gives the tokens.
        template: The chat template, in Jinja.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str | None) -> "Chat":
        """Take the given template, or else the tokenizer's.

        Raises:
            InputError: If there is neither.
        """
        if template is None and not tokenizer.chat_template:
            raise InputError(
                f"the data has conversations, but the tokenizer '{tokenizer.name_or_path}' has no "
                "chat template; write data.chat_template: template.jinja, or make the data "
                "prompt + completion as strings, or text"
            )
        return cls(tokenizer=tokenizer, template=template or tokenizer.get_chat_template())

    def check_marks(self) -> None:
        """Make sure that the template and the tokenizer can tell which tokens the assistant wrote.

        Raises:
            InputError: If not.
        """
        name = self.tokenizer.name_or_path
        if _MARKS.search(self.template) is None:
            raise InputError(
                f"the chat template of '{name}' does not mark what the assistant says "
                "({% generation %}), so its turns cannot be told from the rest; write "
                "data.assistant_only: false to supervise whole conversations, or "
                "data.chat_template: template.jinja with a copy that marks them, or make the data "
                "prompt + completion"
            )
        if not self.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of '{name}' is not a fast one, so it cannot say which tokens are "
                "the assistant's; write data.assistant_only: false to supervise whole "
                "conversations, or make the data prompt + completion"
            )

    def render(self, messages: object, tools: object = None, *, ask: bool = False) -> str:
        """The text of a conversation; `ask` adds the beginning of the assistant's next turn."""
        return self._render(messages, tools, ask=ask)[0]

    def marked(self, messages: object, tools: object = None) -> tuple[str, Spans]:
        """The text of a conversation, and from where to where the assistant speaks."""
        return self._render(messages, tools, marks=True)

    def whole(self, texts: Sequence[str]) -> list[Example]:
        """Supervise all of some rendered conversations."""
        return [after(0, ids) for ids in tokenize(self.tokenizer, texts, special=False)]

    def turns(self, marked: Sequence[tuple[str, Spans]]) -> list[Example]:
        """Supervise the tokens with a character in a span.

        Not `apply_chat_template(return_assistant_tokens_mask=True)`: it asks which token has the
        first character of a span, and skips the whole turn if none does. Tokenizers that trim
        offsets (Llama 3, GPT-2) give no token to a leading space. A trailing one is worse: the
        mask then runs on to the end of the conversation.
        """
        if not marked:
            return []
        encoded = self.tokenizer(
            [text for text, _ in marked],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        parts = zip(encoded["input_ids"], encoded["offset_mapping"], marked, strict=True)
        return [_supervise(ids, offsets, spans) for ids, offsets, (_, spans) in parts]

    def completion(self, prompt: object, completion: object, tools: object = None) -> Example:
        """Supervise what the completion adds to the rendering of the prompt.

        Raises:
            BadRow: If one of them is no list of messages, or if the template renders the prompt
                differently once the completion follows.
        """
        given, answer = _messages(prompt, "prompt"), _messages(completion, "completion")
        if not given or not answer:
            return EMPTY
        asks = given[-1].get("role") != "assistant"
        asked = self.render(given, tools, ask=asks)
        text = self.render([*given, *answer], tools)
        cut = common(asked, text)
        # Some templates begin an answer in another way than they render one (`<think>`). What the
        # two have in common is the prompt then, but all of the messages must be in it.
        if cut < len(asked) and not text[:cut].startswith(self.render(given, tools)):
            raise BadRow(
                "the chat template renders the prompt differently when the completion follows, so "
                "there is no boundary between them; write data.completion_only: false, or give "
                "prompt and completion as strings"
            )
        start, ids = tokenize(self.tokenizer, [text[:cut], text], special=False)
        return after(common(start, ids), ids)

    def _render(
        self, messages: object, tools: object, *, ask: bool = False, marks: bool = False
    ) -> tuple[str, Spans]:
        conversation = _messages(messages, "messages")
        try:
            texts, spans = _render(
                conversations=[conversation],
                tools=_tools(tools),
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=ask,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow(f"the chat template does not accept it: {error}") from error
        return texts[0], spans[0] if marks else []


def _supervise(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Spans) -> Example:
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    chosen = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        # A token of white space only may be trimmed to nothing; its end is where it was.
        trimmed = (begin == end) & (first < end) & (end <= last)
        chosen |= (begin < last) & (end > first) & (begin < end) | trimmed
    labels = [token if keep else IGNORE for token, keep in zip(ids, chosen, strict=True)]
    return Example(ids, labels)


def _messages(value: object, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow(f"column '{column}' has {str(value)[:40]!r}, not a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message:
            raise BadRow(
                f"column '{column}' has the message {str(message)[:40]!r}; a message is like "
                "{'role': 'user', 'content': 'Hi'}"
            )
    return [_clean(message) for message in value]


def _clean(message: Message) -> dict[str, object]:
    """Drop what is None: Arrow adds it where only other messages of the data have a key."""
    return {key: _clean_value(value) for key, value in message.items() if value is not None}


def _clean_value(value: object) -> object:
    if isinstance(value, Mapping):
        return _clean(value)
    return [_clean_value(item) for item in value] if isinstance(value, list) else value


def _tools(value: object) -> list[object] | None:
    tools = json.loads(value) if isinstance(value, str) else value
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow(f"column 'tools' has {str(value)[:40]!r}, not a list of tools, or JSON of one")
    return [_clean_value(tool) for tool in tools]
