"""Where the blocks of a cut student come from: written, kept by transformers, read with care."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3Config, LlamaConfig, PreTrainedConfig

from llm_distill.provenance import KEY, Provenance
from llm_distill.signals import ModelSpec

FOUND = Provenance((1, 4, 12), 12, "me/teacher")


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=3)


def test_transformers_keeps_it(config: LlamaConfig, tmp_path: Path) -> None:
    FOUND.write(config)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert Provenance.read(read) == FOUND
    assert ModelSpec.of(read, "student").blocks == (1, 4, 12)
    assert getattr(read, KEY) == {"blocks": [1, 4, 12], "of": 12, "teacher": "me/teacher"}


def test_a_composite_config_counts_its_language_model() -> None:
    config: PreTrainedConfig = Gemma3Config(text_config={"num_hidden_layers": 3})
    FOUND.write(config)
    assert Provenance.read(config) == FOUND


def test_there_is_none_by_default(config: LlamaConfig) -> None:
    assert Provenance.read(config) is None
    assert ModelSpec.of(config, "student").blocks is None


@pytest.mark.parametrize(
    "value",
    [
        {"blocks": [1, 4], "of": 12},
        {"blocks": [1, 4, 13], "of": 12},
        {"blocks": [0, 4, 12], "of": 12},
        {"blocks": [1, 4, 4], "of": 12},
        {"blocks": [1, 4, "12"], "of": 12},
        {"blocks": [1, 4, 12], "of": "12"},
        {"blocks": [1, 4, 12]},
        {"blocks": 3, "of": 12},
        {"of": 12},
        {"blocks": [], "of": 12},
        [1, 4, 12],
        "blocks 1, 4, 12",
    ],
    ids=str,
)
def test_what_does_not_fit_is_none(value: Any, config: LlamaConfig) -> None:
    """A config that was edited, or a student whose depth changed since."""
    setattr(config, KEY, value)
    assert Provenance.read(config) is None
