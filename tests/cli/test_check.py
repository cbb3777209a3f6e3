from typing import Any

import pytest

from llm_distill import loading
from tests.cli.conftest import Cli


def test_it_shows_what_would_be_trained_and_loads_nothing(
    cli: Cli, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", refuse)
    objectives = [
        "Logits",
        {"HiddenStates": {"init": "least_squares", "weight": {"linear": {"start": 1, "end": 0}}}},
        {"AttentionMaps": {"layers": {"last": {"n": 2}}, "heads": "match"}},
    ]
    gpu = {**content["training"], "use_cpu": False, "bf16": True}
    ended = cli("check", objectives=objectives, training=gpu)
    assert ended.code == 0, ended.err
    for words in (
        "HiddenStates",
        "linear(start=1.0, end=0.0)",
        "1 | 2 of 4",
        "projectors: least squares, decided at calibration",
        "heads: matched, decided at calibration",
        "last 2",
        "No weights were loaded",
    ):
        assert words in ended.out
