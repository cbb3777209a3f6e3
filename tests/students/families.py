"""Teachers of five blocks of every family that can be cut, by name."""

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests import tiny

DEPTH = 5

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(*, tied: bool) -> PreTrainedModel:
    """With a head of its own or tied."""
    config = tiny.llama("student", tied=tied).config
    config.num_hidden_layers = DEPTH
    return tiny.sharpened(type(tiny.llama("student")), config)


def gemma3() -> PreTrainedModel:
    """Full attention in the second and fourth block."""
    config = tiny.gemma3(depth=DEPTH).config
    config.layer_types = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    return tiny.sharpened(type(tiny.gemma3()), config)


def gemma3_composite() -> PreTrainedModel:
    """A language model beside a vision tower of as many blocks."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": DEPTH, "image_size": 28, "patch_size": 14}
    text = tiny.gemma3(depth=DEPTH).config.to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return tiny.sharpened(Gemma3ForConditionalGeneration, config)


def mixtral() -> PreTrainedModel:
    """Experts that are stored one by one and held as one tensor."""
    return tiny.sharpened(MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    """Experts in every second block, but for the fourth."""
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    experts |= {
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    config = Qwen3MoeConfig(**SMALL, **experts)
    return tiny.sharpened(Qwen3MoeForCausalLM, config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(tied=False),
    "tied llama": lambda: llama(tied=True),
    "qwen3": lambda: tiny.qwen3(depth=DEPTH),
    "gpt2": lambda: tiny.gpt2(depth=DEPTH),
    "gemma2": lambda: tiny.gemma2(depth=DEPTH),
    "gemma3": gemma3,
    "gemma3 composite": gemma3_composite,
    "bert": lambda: tiny.bert(depth=DEPTH),
    "mixtral": mixtral,
    "qwen3 moe": qwen3_moe,
}


def auto(model: PreTrainedModel) -> Any:
    """The class that opens what was saved."""
    masked = "ForMaskedLM" in type(model).__name__
    return AutoModelForMaskedLM if masked else AutoModelForCausalLM
