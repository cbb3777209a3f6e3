"""Which task a config's model is for: masked or causal language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def is_masked(config: PreTrainedConfig) -> bool:
    """Whether a config belongs to a masked language model.

    It says so by the class it was saved from, or, where it was never saved, by its kind.
    """
    if config.architectures:
        return any("ForMaskedLM" in n or "ForPreTraining" in n for n in config.architectures)
    return has_masked(config) and not getattr(config, "is_decoder", False)


def has_masked(config: PreTrainedConfig) -> bool:
    """Whether there is a masked language model of this kind."""
    return "MaskedLM" in MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type, "")


def has_causal(config: PreTrainedConfig) -> bool:
    """Whether there is a causal language model of this kind, at least by name."""
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def sees_only_the_past(config: PreTrainedConfig) -> bool:
    """Whether the causal language model of this kind really is one; BERT's is with `is_decoder`."""
    decoder = not has_masked(config) or getattr(config, "is_decoder", False)
    return has_causal(config) and bool(decoder)
