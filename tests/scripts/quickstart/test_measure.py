from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts._quickstart import measure
from scripts._quickstart.tokenizer import train_tokenizer
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "The words of this text are the tokens of the model. " * 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(TEXT, 300)
    model = tiny.llama("student", vocabulary=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_becomes_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "BLOCK", 32)
    monkeypatch.setattr(measure, "NEW_TOKENS", 8)
    metrics = {"perplexity": 9.0, "kl": 0.5, "agreement": 0.25}
    first, second = (measure.measure("it", folder, metrics, "The words") for _ in range(2))
    assert (first.name, first.perplexity, first.kl, first.agreement) == ("it", 9.0, 0.5, 0.25)
    vocabulary = 300 * 32 * 2
    assert vocabulary < first.parameters < vocabulary + 20_000
    assert first.speed > 0
    assert first.sample == second.sample
    assert "The words" not in first.sample


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("first document\n\nToo short.\n" + "a b c d e f g h " * 3 + "i.\n", "a b c d e f g h"),
        ("only this one.\n", "only this one."),
    ],
)  # fmt: skip
def test_the_prompt_begins_a_long_paragraph_of_the_last_document(text: str, prompt: str) -> None:
    assert measure.prompt_of(text) == prompt
