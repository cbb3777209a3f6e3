"""Masked or causal, as a config tells it."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedConfig, RoFormerConfig

from llm_distill.kinds import has_causal, has_masked, is_masked, sees_only_the_past
from tests import tiny


@pytest.mark.parametrize(
    ("make", "masked", "either"),
    [
        (lambda: tiny.llama("student").config, False, False),
        (lambda: tiny.bert().config, True, True),
        (lambda: RoFormerConfig(is_decoder=True), False, True),
        (RoFormerConfig, True, True),
    ],
)
def test_kinds(make: Callable[[], PreTrainedConfig], masked: bool, either: bool) -> None:
    config = make()
    config.architectures = None
    assert is_masked(config) is masked
    assert has_masked(config) is either
    assert sees_only_the_past(config) is not masked
    assert has_causal(config)


def test_what_a_config_was_saved_from_decides() -> None:
    config = RoFormerConfig(is_decoder=True, architectures=["RoFormerForMaskedLM"])
    assert is_masked(config)
