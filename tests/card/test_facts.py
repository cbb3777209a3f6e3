"""How names and texts are shown to the public."""

from pathlib import Path

import pytest

from llm_distill.card.facts import (
    DataFacts,
    ModelFacts,
    base,
    is_linked,
    is_repo_id,
    origin_of,
    scrub,
    shown,
    slug,
)
from tests.hub_card import REPO_ID


def test_a_folder_hides_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert origin_of("out/student") == "hub"
    (tmp_path / "out" / "student").mkdir(parents=True)
    assert origin_of("out/student") == "local"


def test_a_path_that_is_called_a_hub_id_is_not_believed() -> None:
    assert not is_linked(ModelFacts(name="/models/qwen", origin="hub"))
    assert shown(DataFacts(name="/data/corpus.jsonl", origin="hub")) == "corpus.jsonl"


def test_a_token_is_no_repo_id() -> None:
    assert is_repo_id("me/hf_model")
    assert not is_repo_id("me/hf_abcdefgh1234")


@pytest.mark.parametrize("name", ["", "/", "..", "~", "a b/c d", "x--y", "a..b", "-", "données"])
def test_every_slug_is_a_hub_id(name: str) -> None:
    assert REPO_ID.fullmatch(slug(base(name)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b", "b"),
        ("'/a/b/'", "'b'"),
        ("x=/a/b, y", "x=b, y"),
        ("~ann/b.", "b."),
        (r"D:\a\b", "b"),
        (r"\\host\a\b", "b"),
        ("file:///a/b", "b"),
        ("a/b ./c ../d 1/2 KL/T </b>", "a/b ./c ../d 1/2 KL/T </b>"),
        ("http://127.0.0.1:80/a/b s3://a/b", "http://127.0.0.1:80/a/b s3://a/b"),
        ("hf_short hf_abcdefgh", "hf_short hf_[redacted]"),
    ],
)
def test_scrub(text: str, expected: str) -> None:
    assert scrub(text) == expected


def test_scrub_knows_paths_with_blanks() -> None:
    assert scrub("from /a b/c d/e f now", ["/a b/c d/e f"]) == "from e f now"
    assert scrub("from a/b now", ["a/b"]) == "from a/b now"
