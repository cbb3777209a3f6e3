"""Sizes and shapes from a config alone."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaConfig

from llm_distill.errors import InputError
from llm_distill.placement import Launch, choose, facts_of
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


LARGE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
)
"""70B, of which head and embedding are 2.1B."""


@pytest.mark.parametrize(
    ("quantize", "world", "free", "size", "kind"),
    [
        (None, 8, 79, 141.1, "fsdp2"),
        ("bitsandbytes_8bit", 8, 79, 72.7, None),
        ("bitsandbytes_8bit", 8, 150, 72.7, "replica"),
        ("torchao_int8", 8, 150, 72.7, "replica"),
        ("torchao_float8", 8, 150, 72.7, "replica"),
        ("bitsandbytes_4bit", 8, 78, 39.5, None),
        ("bitsandbytes_4bit", 8, 80, 39.5, "replica"),
        ("torchao_int4", 8, 90, 42.7, "replica"),
        (None, 1, 150, 141.1, "offload"),
        ("bitsandbytes_8bit", 1, 150, 72.7, "replica"),
        ("bitsandbytes_4bit", 1, 40, 39.5, None),
    ],
)
def test_what_fits_quantised(
    quantize: str | None, world: int, free: int, size: float, kind: str | None
) -> None:
    """Whole on every process where half of the free memory is enough; else in words (None)."""
    facts = facts_of(LARGE, "70B", quantize=quantize)
    assert facts.size / 1e9 == pytest.approx(size, abs=0.05)
    launch = Launch(world=world, local=world, device="cuda", free=free * 10**9)
    if kind is not None:
        assert choose("auto", None, facts, launch).kind == kind
        return
    with pytest.raises(InputError, match="its weights are quantised, so that it cannot"):
        choose("auto", None, facts, launch)
    assert choose("replica", None, facts, launch).kind == "replica"
