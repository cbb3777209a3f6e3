from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from llm_distill.data import blocks as module
from llm_distill.data.blocks import block_dataset, blocks
from llm_distill.errors import InputError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
BOS, END = 0, 1
TEXT = "the cat sat on the mat;\n\nhello world\n" * 20


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_file_is_one_stream_of_tokens(file: str, tokenizer: PreTrainedTokenizerFast) -> None:
    cut = list(blocks([file], tokenizer, 16))
    assert {len(block) for block in cut[:-1]} == {16}
    assert 1 <= len(cut[-1]) <= 16
    assert list(chain(*cut)) == [*tokenizer(TEXT)["input_ids"], END]


def test_every_file_ends_and_the_next_one_begins_in_the_same_block(
    file: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.txt").write_text("hello")
    files = [file, str(tmp_path / "empty.txt"), str(tmp_path / "b.txt")]
    tokens = list(chain(*blocks(files, tokenizer, 16)))
    assert tokens == [*tokenizer(TEXT)["input_ids"], END, *tokenizer("hello")["input_ids"], END]


@pytest.mark.parametrize("adds", ["bos", "bos eos"])
def test_every_block_begins_as_the_tokenizer_does(
    file: str, make_tokenizer: MakeTokenizer, adds: str
) -> None:
    tokenizer = make_tokenizer(adds=adds)
    cut = list(blocks([file], tokenizer, 16))
    assert {len(block) for block in cut[:-1]} == {16}
    assert {block[0] for block in cut} == {BOS}
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert list(chain(*(block[1:] for block in cut))) == [*plain, END]


def test_a_large_file_is_read_in_pieces_that_end_with_a_line(
    file: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(blocks([file], tokenizer, 16))
    monkeypatch.setattr(module, "_PIECE", 30)
    assert tokenizer.decode(list(chain(*blocks([file], tokenizer, 16)))) == TEXT + "</s>"
    assert len(list(blocks([file], tokenizer, 16))) == len(whole)


def test_a_file_that_is_not_utf8_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match=r"a.txt' is not UTF-8 .*convert it: iconv"):
        list(blocks([str(tmp_path / "a.txt")], tokenizer, 16))


def test_a_dataset_and_a_stream_have_the_same_blocks(
    file: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    table = block_dataset([file], tokenizer, 16, streaming=False, limit=None)
    stream = block_dataset([file], tokenizer, 16, streaming=True, limit=None)
    assert isinstance(table, Dataset)
    assert isinstance(stream, IterableDataset)
    assert list(table) == list(stream) == [{"input_ids": b} for b in blocks([file], tokenizer, 16)]


def test_a_limit_is_a_number_of_blocks(file: str, tokenizer: PreTrainedTokenizerFast) -> None:
    limited = block_dataset([file], tokenizer, 16, streaming=False, limit=3)
    whole = block_dataset([file], tokenizer, 16, streaming=False, limit=None)
    assert list(limited) == list(whole)[:3]


def test_a_changed_file_is_read_again(file: str, tokenizer: PreTrainedTokenizerFast) -> None:
    before = block_dataset([file], tokenizer, 16, streaming=False, limit=None)
    Path(file).write_text("hello world\n")
    after = block_dataset([file], tokenizer, 16, streaming=False, limit=None)
    assert len(before) > 1
    assert tokenizer.decode(after[0]["input_ids"]) == "hello world\n</s>"


def test_another_tokenizer_or_length_is_another_dataset(
    file: str, make_tokenizer: MakeTokenizer
) -> None:
    def first(tokenizer: PreTrainedTokenizerFast, length: int) -> list[int]:
        rows = block_dataset([file], tokenizer, length, streaming=False, limit=1)
        ids: list[int] = rows[0]["input_ids"]
        return ids

    assert len(first(make_tokenizer(), 16)) == 16
    assert len(first(make_tokenizer(), 8)) == 8
    assert first(make_tokenizer(adds="bos"), 16)[0] == BOS
