import re
from collections.abc import Callable

import pytest
from transformers import (
    BatchEncoding,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llm_distill.data.chat import Chat
from llm_distill.data.encode import BadRow, Example
from llm_distill.errors import InputError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Conversation = list[dict[str, str]]


def said(*turns: str) -> Conversation:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


def supervised(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the supervised tokens, gaps shown as `|`."""
    kept = [token if token == label else None for token, label in zip(*example, strict=True)]
    words = ["|" if token is None else str(tokenizer.decode([token])) for token in kept]
    return re.sub(r"\|+", "|", "".join(words))


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> Chat:
    return Chat.of(tokenizer, None)


def test_every_turn_of_the_assistant_is_supervised(chat: Chat) -> None:
    marked = chat.marked(said("hello", "the cat", "you", "the mat"))
    (example,) = chat.turns([marked])
    assert chat.tokenizer.decode(example.ids) == marked[0]
    assert supervised(example, chat.tokenizer) == "|the cat</s>|the mat</s>|"


@pytest.mark.parametrize(
    "turns",
    [("hello",), ("hello", "world"), ("a", "b", "c", "d\n\ne"), ("hello", "", "you")],
)
def test_it_agrees_with_transformers_where_that_is_right(
    chat: Chat, turns: tuple[str, ...]
) -> None:
    (example,) = chat.turns([chat.marked(said(*turns))])
    expected = chat.tokenizer.apply_chat_template(
        said(*turns), return_assistant_tokens_mask=True, return_dict=True
    )
    assert isinstance(expected, BatchEncoding)
    assert example.ids == expected["input_ids"]
    assert [int(label != -100) for label in example.labels] == expected["assistant_masks"]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", [" world", "world ", "  world  ", "\n", " "])
def test_white_space_at_the_ends_of_a_turn_moves_no_boundary(
    make_tokenizer: MakeTokenizer, answer: str, trim: bool
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{% generation %}{{ m.content }}{% endgeneration %}</s>"
        "{% else %}<|user|>{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    chat = Chat.of(make_tokenizer(template, trim=trim), None)
    (example,) = chat.turns([chat.marked(said("hello", answer, "the cat"))])
    assert supervised(example, chat.tokenizer) == f"|{answer}|"


def test_a_token_merged_over_the_beginning_of_a_turn_is_supervised(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = (
        "{% for m in messages %}a {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    chat = Chat.of(make_tokenizer(template), None)
    (example,) = chat.turns([chat.marked([{"role": "assistant", "content": "world"}])])
    assert supervised(example, chat.tokenizer) == "| world"


def test_whole_conversations(make_tokenizer: MakeTokenizer) -> None:
    chat = Chat.of(make_tokenizer("unmarked", adds="bos"), None)
    text = chat.render(said("hello", "world"))
    (example,) = chat.whole([text])
    assert (
        chat.tokenizer.decode(example.ids) == text == "<|user|>hello</s>\n<|assistant|>world</s>\n"
    )
    assert example.labels == example.ids


def test_nothing_renders_to_nothing(chat: Chat) -> None:
    assert chat.turns([]) == []
    assert chat.whole([]) == []


def test_keys_that_arrow_filled_up_are_left_out(make_tokenizer: MakeTokenizer) -> None:
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}"
    chat = Chat.of(make_tokenizer(template), None)
    message = {"role": "user", "content": None, "calls": [{"name": "f", "arguments": {"x": None}}]}
    tools = [{"name": "f", "parameters": None}]
    assert chat.render([message], tools) == (
        '{"role": "user", "calls": [{"name": "f", "arguments": {}}]}[{"name": "f"}]'
    )
    assert chat.render([message], '[{"name": "f"}]').endswith('[{"name": "f"}]')


def test_a_completion_is_what_it_adds_to_the_prompt(chat: Chat) -> None:
    conversation = said("hello", "the cat", "you", "the mat")
    example = chat.completion(conversation[:3], conversation[3:])
    assert chat.tokenizer.decode(example.ids) == chat.render(conversation)
    assert supervised(example, chat.tokenizer) == "|the mat</s>\n"


def test_a_prompt_may_end_with_the_assistant(chat: Chat) -> None:
    conversation = said("hello", "the cat", "you", "the mat")
    example = chat.completion(conversation[:2], conversation[2:])
    assert supervised(example, chat.tokenizer) == "|<|user|>you</s>\n<|assistant|>the mat</s>\n"


@pytest.mark.parametrize(("given", "answer"), [(0, 2), (2, 0)])
def test_without_a_prompt_or_a_completion_the_example_is_empty(
    chat: Chat, given: int, answer: int
) -> None:
    turns = said("hello", "world")
    assert chat.completion(turns[:given], turns[:answer]) == ([], [])


def test_a_template_may_begin_an_answer_in_another_way(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\nthe{% endif %}"
    )
    chat = Chat.of(make_tokenizer(template), None)
    example = chat.completion(said("hello"), said("", "world")[1:])
    assert supervised(example, chat.tokenizer) == "|world"


def test_a_template_that_rewrites_the_prompt_is_refused(make_tokenizer: MakeTokenizer) -> None:
    chat = Chat.of(make_tokenizer("{{ messages | length }}{{ messages[-1].content }}"), None)
    with pytest.raises(
        BadRow,
        match=r"renders the prompt differently when the completion follows.* write "
        r"data.completion_only: false, or give prompt and completion as strings",
    ):
        chat.completion(said("hello"), said("", "world")[1:])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "column 'messages' has 'None', not a list of messages"),
        (
            [{"from": "human"}],
            "column 'messages' has the message \"{'from': 'human'}\"; a message is like "
            "{'role': 'user', 'content': 'Hi'}",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(chat: Chat, messages: object, message: str) -> None:
    with pytest.raises(BadRow, match=re.escape(message)):
        chat.render(messages)


def test_tools_that_are_no_list_are_refused(chat: Chat) -> None:
    with pytest.raises(BadRow, match=re.escape("column 'tools' has \"{'a': 1}\", not a list of")):
        chat.render(said("hello"), {"a": 1})


def test_what_the_template_says_against_a_conversation_is_told(
    make_tokenizer: MakeTokenizer,
) -> None:
    chat = Chat.of(make_tokenizer("{{ raise_exception('roles must alternate') }}"), None)
    with pytest.raises(BadRow, match="the chat template does not accept it: roles must alternate"):
        chat.render(said("hello"))


def test_a_given_template_replaces_the_tokenizers(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat.of(tokenizer, "{{ messages[0].content }}!")
    assert chat.render(said("hello")) == "hello!"


def test_a_tokenizer_without_a_template_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(
        InputError,
        match=r"the tokenizer 'me/tiny' has no chat template; write data.chat_template: "
        r"template.jinja, or make the data prompt \+ completion as strings, or text",
    ):
        Chat.of(make_tokenizer(None), None)


@pytest.mark.parametrize("mark", ["{% generation %}", "{%- generation -%}"])
def test_marks_are_found(tokenizer: PreTrainedTokenizerFast, mark: str) -> None:
    Chat.of(tokenizer, mark + "a{% endgeneration %}").check_marks()


def test_a_template_without_marks_is_refused_with_three_ways_out(
    make_tokenizer: MakeTokenizer,
) -> None:
    with pytest.raises(
        InputError,
        match=r"the chat template of 'me/tiny' does not mark .* \(\{% generation %\}\).* "
        r"data.assistant_only: false .* data.chat_template: template.jinja .* prompt \+ completion",
    ):
        Chat.of(make_tokenizer("unmarked"), None).check_marks()


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which has no offsets."""

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_a_tokenizer_without_offsets_is_refused_for_turns_but_not_for_completions() -> None:
    letters = Letters(name_or_path="me/letters")
    template = (
        "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    chat = Chat.of(letters, template)
    with pytest.raises(
        InputError,
        match=r"the tokenizer of 'me/letters' is not a fast one.* data.assistant_only: false",
    ):
        chat.check_marks()
    example = chat.completion(said("ab"), said("", "cd")[1:])
    assert example == ([97, 98, 99, 100], [-100, -100, 99, 100])
