from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Data, load

Lines = Callable[[str, list[dict[str, object]]], str]
Numbered = Callable[[str, int], str]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def test_a_second_run_finds_the_tokens_of_the_first_and_still_counts_them(
    tokenizer: PreTrainedTokenizerFast, numbered: Numbered
) -> None:
    data = Data(path=numbered("a.jsonl", 5), max_length=3)
    first = load(data, tokenizer, max_positions=None)
    second = load(data, tokenizer, max_positions=None)
    assert isinstance(first.train, Dataset)
    assert isinstance(second.train, Dataset)
    assert first.train.cache_files == second.train.cache_files != []
    assert first.report == second.report


def test_what_changes_the_tokens_changes_what_is_found(
    make_tokenizer: MakeTokenizer, numbered: Numbered, lines: Lines
) -> None:
    path = numbered("a.jsonl", 2)

    def first(tokenizer: PreTrainedTokenizerFast, length: int) -> list[int]:
        prepared = load(Data(path=path, max_length=length), tokenizer, max_positions=None)
        ids: list[int] = next(iter(prepared.train))["input_ids"]
        return ids

    plain = first(make_tokenizer(), 8)
    assert first(make_tokenizer(), 2) == plain[:2]
    assert first(make_tokenizer(adds="bos"), 8) == [0, *plain]
    lines("a.jsonl", [{"text": "you"}])
    assert first(make_tokenizer(), 8) == make_tokenizer()("you</s>")["input_ids"]
