from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from scripts._quickstart.tokenizer import END, PAD, train_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "The tokens of a text are the words of the text. " * 20


def test_every_text_comes_back() -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    for text in ("The text of a token.", "\u00e9t\u00e9 \u2192 \U0001f600\n\n  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_vocabulary_has_the_size_asked_for_and_special_tokens() -> None:
    tokenizer = train_tokenizer(TEXT, 270)
    assert len(tokenizer) == 270
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer(" text")["input_ids"]) == 1


def test_the_same_text_gives_the_same_tokens() -> None:
    first, second = (train_tokenizer(TEXT, 300).get_vocab() for _ in range(2))
    assert first == second


def test_it_is_found_where_it_was_saved(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
