import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Counter
from llm_distill.data.encoder import Encoder, Kind, StreamEncoder, count
from llm_distill.errors import InputError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
MakeEncoder = Callable[..., Encoder]
BOS, END = 0, 1


@pytest.fixture
def make_encoder(tokenizer: PreTrainedTokenizerFast) -> MakeEncoder:
    def make(kind: Kind, **fields: object) -> Encoder:
        defaults: dict[str, object] = {
            "tokenizer": tokenizer,
            "text": "text",
            "max_length": None,
            "supervise_all": False,
            "template": None,
            "where": "'me/data'",
        }
        return Encoder(kind=kind, **(defaults | fields))  # type: ignore[arg-type]  # fields by name

    return make


def pair(encoder: Encoder, prompt: object, completion: object) -> tuple[list[str], list[str]]:
    """The tokens of one example before and after the boundary."""
    encoded = encoder({"prompt": [prompt], "completion": [completion]}, [0])
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    boundary = sum(label == -100 for label in labels)
    assert labels == [-100] * boundary + ids[boundary:]
    words = [str(encoder.tokenizer.decode([token])) for token in ids]
    return words[:boundary], words[boundary:]


def test_a_completion_is_supervised_to_its_end(make_encoder: MakeEncoder) -> None:
    assert pair(make_encoder("pairs"), "hello", " world") == (["hello"], [" world", "</s>"])


@pytest.mark.parametrize("adds", ["bos", "bos eos"])
def test_special_tokens_of_the_tokenizer_move_no_boundary(
    make_encoder: MakeEncoder, make_tokenizer: MakeTokenizer, adds: str
) -> None:
    encoder = make_encoder("pairs", tokenizer=make_tokenizer(adds=adds))
    assert pair(encoder, "hello", " world") == (["<s>", "hello"], [" world", "</s>"])
    assert pair(encoder, "", "hello") == (["<s>"], ["hello", "</s>"])


def test_a_token_merged_over_the_boundary_belongs_to_the_completion(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("pairs")
    assert pair(encoder, "hello ", "world") == (["hello"], [" world", "</s>"])
    assert pair(encoder, "hello wor", "ld") == (["hello"], [" world", "</s>"])


def test_every_split_of_a_text_gives_the_tokens_of_the_whole(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("pairs")
    text = "hello world,\n\n the cat  sat é</s>on"
    whole = encoder.tokenizer(text)["input_ids"]
    for cut in range(len(text)):
        encoded = encoder({"prompt": [text[:cut]], "completion": [text[cut:]]}, [0])
        assert encoded["input_ids"][0] == [*whole, END]
        given = [
            token
            for token, label in zip(encoded["input_ids"][0], encoded["labels"][0], strict=True)
            if label == -100
        ]
        assert text[:cut].startswith(str(encoder.tokenizer.decode(given)))


def test_an_empty_completion_is_an_empty_example(make_encoder: MakeEncoder) -> None:
    assert pair(make_encoder("pairs"), "hello", "") == ([], [])


def test_a_prompt_can_be_supervised_too(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("pairs", supervise_all=True)
    assert pair(encoder, "hello", " world") == ([], ["hello", " world", "</s>"])
    assert pair(encoder, "hello", "") == ([], [])


def test_conversational_pairs(make_encoder: MakeEncoder) -> None:
    given = [{"role": "user", "content": "hello"}]
    answer = [{"role": "assistant", "content": "cat"}]
    before, after = pair(make_encoder("chat pairs"), given, answer)
    assert "".join(before) == "<|user|>hello</s>\n<|assistant|>"
    assert "".join(after) == "cat</s>\n"
    before, after = pair(make_encoder("chat pairs", supervise_all=True), given, answer)
    assert "".join(after) == "<|user|>hello</s>\n<|assistant|>cat</s>\n"


def test_conversations(make_encoder: MakeEncoder) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    encoded = make_encoder("messages")({"messages": [talk, talk[:1]]}, [0, 1])
    assert [label for label in encoded["labels"][0] if label != -100] == [
        *make_encoder("messages").tokenizer("you")["input_ids"],
        END,
    ]
    assert encoded["supervised"][1] == 0
    whole = make_encoder("messages", supervise_all=True)({"messages": [talk]}, [0])
    assert whole["labels"] == whole["input_ids"] == encoded["input_ids"][:1]


def test_tools_reach_the_template(make_encoder: MakeEncoder) -> None:
    template = "{{ tools[0].name }}{% generation %}x{% endgeneration %}"
    encoder = make_encoder("messages", template=template, supervise_all=True)
    talk = [{"role": "user", "content": "hello"}]
    encoded = encoder({"messages": [talk], "tools": [[{"name": "cat"}]]}, [0])
    assert encoder.tokenizer.decode(encoded["input_ids"][0]) == "catx"


def test_what_is_too_long_is_cut_and_counted(make_encoder: MakeEncoder) -> None:
    encoded = make_encoder("text", max_length=3)({"text": ["hello world", "a b c d"]}, [0, 1])
    assert [len(ids) for ids in encoded["input_ids"]] == [3, 3]
    assert [len(labels) for labels in encoded["labels"]] == [3, 3]
    assert encoded["truncated"] == [0, 1]
    assert encoded["input_ids"][0][-1] == END
    assert encoded["input_ids"][1][-1] != END


def test_the_first_token_is_not_counted_because_nothing_predicts_it(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("input_ids")
    columns = {"input_ids": [[5, 6, 7], [5], []], "labels": [[5, -100, 7], [5], []]}
    assert encoder(columns, range(3))["supervised"] == [1, 0, 0]


def test_a_batch_is_counted(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("input_ids", max_length=3)
    columns = {
        "input_ids": [[5, 6], [5, 6, 7, 8], [5, 6, 7, 8], []],
        "labels": [[5, 6], [-100, 6, 7, 8], [-100, -100, -100, 8], []],
    }
    assert count(encoder(columns, range(4)))._asdict() == {
        "examples": 4,
        "truncated": 2,
        "dropped": 2,
        "tokens": 5,
        "supervised_tokens": 3,
    }


def test_a_stream_leaves_out_what_is_of_no_use(make_encoder: MakeEncoder) -> None:
    counter = Counter(None)
    stream = StreamEncoder(encoder=make_encoder("text"), counter=counter)
    assert list(stream({"text": ["", "hello", ""]}, range(3))) == ["input_ids", "labels"]
    assert len(stream({"text": ["", "hello", ""]}, range(3))["input_ids"]) == 1
    assert (counter.report().examples, counter.report().dropped) == (6, 4)


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("text", {"text": ["a", None]}, "column 'text' has nothing (null), not a string"),
        ("pairs", {"prompt": ["a", 7], "completion": ["b", "c"]}, "column 'prompt' has int '7'"),
        ("input_ids", {"input_ids": [[1], None]}, "column 'input_ids' has 'None', not a list"),
        (
            "messages",
            {"messages": [[{"role": "user", "content": "a"}], None]},
            "column 'messages' has 'None', not a list of messages",
        ),
    ],
)
def test_a_bad_row_is_named(
    make_encoder: MakeEncoder, kind: Kind, columns: dict[str, list[object]], message: str
) -> None:
    named = f"row 1,007 of 'me/data' (counted from 0): {message}"
    with pytest.raises(InputError, match=re.escape(named)):
        make_encoder(kind)(columns, [6, 1007])
