import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Data
from llm_distill.data.encoder import Kind
from llm_distill.data.formats import nothing_supervised, open_encoder, used_columns
from llm_distill.errors import InputError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
TALK = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("first", "kind", "used"),
    [
        ({"id": 1, "text": "a"}, "text", ["text"]),
        ({"prompt": "a", "completion": "b", "text": "c"}, "pairs", ["prompt", "completion"]),
        (
            {"prompt": TALK, "completion": TALK, "tools": None},
            "chat pairs",
            ["prompt", "completion", "tools"],
        ),
        ({"prompt": "a", "messages": TALK}, "messages", ["messages"]),
        ({"text": "a", "input_ids": [1]}, "input_ids", ["input_ids"]),
        (
            {"labels": [1], "input_ids": [1], "attention_mask": [1]},
            "input_ids",
            ["labels", "input_ids", "attention_mask"],
        ),
    ],
)
def test_the_columns_tell_the_format(
    tokenizer: PreTrainedTokenizerFast, first: dict[str, object], kind: Kind, used: list[str]
) -> None:
    encoder = open_encoder(first, Data(), tokenizer, 8)
    assert encoder.kind == kind
    assert used_columns(encoder, list(first)) == used


def test_a_named_column_of_text_comes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    first = {"messages": TALK, "body": "a"}
    encoder = open_encoder(first, Data(text="body"), tokenizer, 8)
    assert (encoder.kind, used_columns(encoder, list(first))) == ("text", ["body"])


def test_a_named_column_that_is_missing_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    data = Data(path="me/data", text="body")
    with pytest.raises(
        InputError, match=r"data.text: 'me/data' has no column 'body'; it has 'id', 'text'"
    ):
        open_encoder({"id": 1, "text": "a"}, data, tokenizer, 8)


def test_unknown_columns_are_listed_with_what_is_accepted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    message = (
        "'me/data' has the columns 'id', 'prompt'; accepted are 'text' (or the column that "
        "data.text names), 'prompt' + 'completion', 'messages', or 'input_ids' (+ 'labels')"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        open_encoder({"id": 1, "prompt": "a"}, Data(path="me/data"), tokenizer, 8)


@pytest.mark.parametrize(
    ("first", "data", "everything"),
    [
        ({"messages": TALK}, Data(), False),
        ({"messages": TALK}, Data(assistant_only=False), True),
        ({"messages": TALK}, Data(completion_only=False), False),
        ({"prompt": "a", "completion": "b"}, Data(), False),
        ({"prompt": "a", "completion": "b"}, Data(completion_only=False), True),
        ({"prompt": "a", "completion": "b"}, Data(assistant_only=False), False),
    ],
)
def test_what_is_supervised(
    tokenizer: PreTrainedTokenizerFast, first: dict[str, object], data: Data, everything: bool
) -> None:
    assert open_encoder(first, data, tokenizer, 8).supervise_all is everything


def test_conversations_need_marks_unless_all_is_supervised(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("unmarked")
    with pytest.raises(InputError, match=r"does not mark .* data.assistant_only: false"):
        open_encoder({"messages": TALK}, Data(), tokenizer, 8)
    open_encoder({"messages": TALK}, Data(assistant_only=False), tokenizer, 8)
    open_encoder({"prompt": TALK, "completion": TALK}, Data(), tokenizer, 8)


def test_conversations_need_a_template(make_tokenizer: MakeTokenizer) -> None:
    for first in ({"messages": TALK}, {"prompt": TALK, "completion": TALK}):
        with pytest.raises(InputError, match=r"has no chat template; write data.chat_template"):
            open_encoder(first, Data(), make_tokenizer(None), 8)


def test_a_template_file_gives_the_marks(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "marked.jinja"
    file.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    tokenizer = make_tokenizer("unmarked")
    before = tokenizer.chat_template
    encoder = open_encoder({"messages": TALK}, Data(chat_template=str(file)), tokenizer, 8)
    encoded = encoder({"messages": [TALK]}, [0])
    assert encoded["labels"][0] == tokenizer("hello")["input_ids"]
    assert tokenizer.chat_template == before


def test_a_template_file_that_is_missing_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "marked.jinja").touch()
    data = Data(chat_template=str(tmp_path / "market.jinja"))
    with pytest.raises(InputError, match=r"no file or folder .*did you mean '.*/marked.jinja'\?"):
        open_encoder({"messages": TALK}, data, tokenizer, 8)


@pytest.mark.parametrize(
    ("first", "data", "message"),
    [
        (
            {"input_ids": [1]},
            Data(),
            "the labels are all -100, or cut off at data.max_length 8: write a larger one",
        ),
        ({"messages": TALK}, Data(), "no turn has the role 'assistant' in a way that the chat"),
        ({"prompt": "a", "completion": "b"}, Data(), "the completions are empty, or cut off at"),
        ({"text": "a"}, Data(), "column 'text' has nothing but empty or single-token texts"),
        ({"messages": TALK}, Data(assistant_only=False), "the conversations are empty"),
    ],
)
def test_why_nothing_is_supervised(
    tokenizer: PreTrainedTokenizerFast, first: dict[str, object], data: Data, message: str
) -> None:
    assert nothing_supervised(open_encoder(first, data, tokenizer, 8)).startswith(message)


def test_without_a_length_nothing_is_said_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = open_encoder({"input_ids": [1]}, Data(max_length=None), tokenizer, None)
    assert nothing_supervised(encoder) == "the labels are all -100"
