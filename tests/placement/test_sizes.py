"""Sizes and shapes from a config alone."""

from collections.abc import Callable
from typing import Any

import pytest

from llm_distill.placement import facts_of
from llm_distill.placement.sizes import skeleton
from tests import tiny


@pytest.mark.parametrize(
    ("make", "splits", "blocks"),
    [
        (lambda: tiny.llama("teacher"), True, "model.layers"),
        (lambda: tiny.llama("teacher", tied=True), True, "model.layers"),
        (tiny.qwen3, True, "model.layers"),
        (tiny.gpt2, False, "transformer.h"),
        (tiny.bert, False, "bert.encoder.layer"),
    ],
)
def test_facts_are_those_of_the_loaded_model(
    make: Callable[[], Any], splits: bool, blocks: str
) -> None:
    model = make()
    found = facts_of(model.config, "m", dtype="float32")
    assert found.size == 4 * model.num_parameters()
    assert found.splits is splits
    assert found.blocks == blocks
    assert found.heads == model.config.num_attention_heads


def test_the_dtype_counts() -> None:
    config = tiny.llama("teacher").config
    whole = facts_of(config, "m", dtype="float32").size
    assert facts_of(config, "m", dtype="bfloat16").size == whole // 2
    config.dtype = "bfloat16"
    assert facts_of(config, "m").size == whole // 2


def test_a_skeleton_weighs_nothing() -> None:
    assert all(p.is_meta for p in skeleton(tiny.llama("teacher").config).parameters())


@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "fp8"}, 8),
    ],
)
def test_quantised_weights_are_smaller(quantisation: dict[str, Any], bits: int) -> None:
    config = tiny.llama("teacher").config
    whole = facts_of(config, "m", dtype="float32")
    config.quantization_config = quantisation
    found = facts_of(config, "m", dtype="float32")
    assert found.quantised
    assert not whole.quantised
    assert found.size == whole.size * bits // 32
