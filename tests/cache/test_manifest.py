"""The manifest: written whole, read strictly, compared in words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_distill.cache.estimators import sampled
from llm_distill.cache.layers import Layers
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest, Shard, find
from llm_distill.errors import InputError

GIVEN = Manifest(
    teacher="me/teacher",
    revision="c0ffee",
    weights="aa",
    dtype="bfloat16",
    spec={"name": "me/teacher", "depth": 4},
    tokenizer="bb",
    template="cc",
    keep={"sampled": {"n": 50}},
    shift=True,
    vocabulary=300,
    data={"train": {"examples": 3, "rows": 20, "longest": 9, "keys": "dd"}},
    shards=(Shard("train-00000.parquet", "train", 3, 20, 800, "ee"),),
    fidelity={"kl": 0.0},
)


def test_there_and_back(tmp_path: Path) -> None:
    GIVEN.write(tmp_path / FILE)
    assert Manifest.read(tmp_path / FILE) == GIVEN
    assert find(tmp_path) == GIVEN
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_one_that_was_written_before_there_were_states(tmp_path: Path) -> None:
    GIVEN.write(tmp_path / FILE)
    content = json.loads((tmp_path / FILE).read_text())
    for name in ("states", "frames", "maps", "lost", "files"):
        del content[name]
    (tmp_path / FILE).write_text(json.dumps(content))
    read = Manifest.read(tmp_path / FILE)
    assert read == GIVEN
    assert read.layers is None
    assert read.columns == GIVEN.estimator.columns


def test_hidden_states() -> None:
    kept = Layers((3, 7), "valid", 4096, 256)
    made = replace(GIVEN, states=kept.written(), lost={"3": {"mean": 0.1, "worst": 0.2}})
    assert made.layers == kept
    assert made.columns == (*GIVEN.columns, *kept.columns)
    assert "50 draws, hidden states 3, 7 of all tokens, 256 of 4,096 numbers" in str(made)
    assert GIVEN.differences(made) == ["the kept hidden states"]
    assert made.begun().lost == {}


def test_what_it_tells() -> None:
    assert GIVEN.estimator == sampled(n=50)
    assert (GIVEN.rows, GIVEN.bytes) == (20, 800)
    told = "me/teacher, 50 draws: 3 examples, 20 supervised tokens, 40.0 bytes each"
    assert str(GIVEN) == told
    small = replace(GIVEN, quantised="torchao_int8")
    assert str(small).startswith("me/teacher in torchao_int8, 50 draws: 3 examples")


def test_one_that_was_written_before_teachers_were_quantised(tmp_path: Path) -> None:
    GIVEN.write(tmp_path / FILE)
    content = json.loads((tmp_path / FILE).read_text())
    del content["quantised"]
    (tmp_path / FILE).write_text(json.dumps(content))
    assert Manifest.read(tmp_path / FILE) == GIVEN


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "other"}, "the teacher (me/teacher there, other now)"),
        ({"revision": None}, "the revision of the teacher (c0ffee there, None now)"),
        ({"weights": "x"}, "the weights of the teacher"),
        ({"dtype": "float32"}, "the dtype of the teacher (bfloat16 there, float32 now)"),
        (
            {"quantised": "torchao_int8"},
            "how the teacher is quantised (None there, torchao_int8 now)",
        ),
        ({"tokenizer": "x"}, "the tokenizer"),
        ({"template": "x"}, "the chat template"),
        ({"vocabulary": 3}, "the number of tokens (300 there, 3 now)"),
        ({"shift": False}, "causal or masked models"),
        ({"data": {}}, "the data"),
    ],
)
def test_differences_in_words(changes: dict[str, Any], words: str) -> None:
    assert GIVEN.differences(replace(GIVEN, **changes)) == [words]


def test_a_commit_that_was_not_known_then() -> None:
    assert replace(GIVEN, revision=None).differences(GIVEN) == []


def test_what_does_not_have_to_agree() -> None:
    other = replace(GIVEN, shards=(), index="x", fidelity={}, versions={"torch": "9"}, head={})
    assert GIVEN.differences(other) == []


def test_a_cache_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not there .*llm-distill cache recipe"):
        find(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no cache \(manifest\.json is missing\)"):
        find(tmp_path)
    GIVEN.write(tmp_path / UNFINISHED)
    with pytest.raises(InputError, match="was not written to its end; run llm-distill cache"):
        find(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "shards": 3}'])
def test_what_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match="is no manifest of a cache"):
        Manifest.read(tmp_path / FILE)


def test_a_newer_format(tmp_path: Path) -> None:
    GIVEN.write(tmp_path / FILE)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(InputError, match="format 2, and this version reads 1"):
        Manifest.read(tmp_path / FILE)


def test_files_of_weights_that_were_not_in_memory() -> None:
    known = replace(GIVEN, files={"a.safetensors": "x", "config.json": "y"})
    other = replace(GIVEN, files={"a.safetensors": "z", "config.json": "y"})
    assert known.differences(other) == ["the teacher's a.safetensors (other content)"]
    assert known.differences(known) == []
    assert known.differences(GIVEN) == GIVEN.differences(known) == []  # an older one, or given
    cut_otherwise = replace(GIVEN, files={"b.safetensors": "z", "config.json": "y"})
    assert known.differences(cut_otherwise) == []


def test_tempered_distributions_are_not_read_as_others(tmp_path: Path) -> None:
    replace(GIVEN, temperature=2.0).write(tmp_path / FILE)
    with pytest.raises(InputError, match=r"at temperature 2\.0, and this version reads what was"):
        Manifest.read(tmp_path / FILE)
