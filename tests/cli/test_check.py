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
        {
            "HiddenStates": {
                "layers": "uniform",
                "init": "least_squares",
                "weight": {"linear": {"start": 1, "end": 0}},
            }
        },
        {"AttentionMaps": {"layers": {"last": {"n": 2}}, "heads": "match"}},
    ]
    gpu = {**content["training"], "use_cpu": False, "bf16": True}
    balance = {"gradient": {"every": 7}}
    ended = cli("check", objectives=objectives, training=gpu, balance=balance)
    assert ended.code == 0, ended.err
    for words in (
        "HiddenStates",
        "linear(start=1.0, end=0.0)",
        "1 | 2 of 4",
        "projectors: least squares, decided at calibration",
        "heads: matched, decided at calibration",
        "last 2",
        "Balance: gradient: norms at hidden state 0 of the student",
        "No weights were loaded",
    ):
        assert words in ended.out


def test_maps_that_data_decide_are_shown_as_such(cli: Cli) -> None:
    ended = cli("check", objectives=["Logits", {"HiddenStates": {"layers": {"auto": {"most": 4}}}}])
    assert ended.code == 0, ended.err
    assert "auto(most=4), decided at calibration; until then uniform" in ended.out
    assert "Layer maps that data decide: `llm-distill map` shows them" in ended.out


def test_provenance_is_decided_by_the_config(cli: Cli) -> None:
    cut = {"FromTeacher": {"depth": 2}}
    hint = {"HiddenStates": {"layers": "provenance"}}
    ended = cli("check", student=cut, objectives=["Logits", hint])
    assert ended.code == 0, ended.err
    assert "provenance, blocks [1, 4]" in ended.out
    assert "1 | 3 of 4" in ended.out
    assert "llm-distill map" not in ended.out


def test_hints_for_a_fresh_student_fade(cli: Cli) -> None:
    fresh = {"FromConfig": {"architecture": "gpt2", "config": {"n_layer": 1, "n_positions": 40}}}
    hint = {"HiddenStates": {"layers": "last", "weight": 0.5}}
    ended = cli("check", student=fresh, objectives=["Logits", hint])
    assert ended.code == 0, ended.err
    assert "linear(start=0.5, end=0.0, until=0.6)" in ended.out
