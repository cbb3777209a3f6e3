"""What a config tells of a model's size and shape, without a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from llm_distill import blocks, loading, quantising, zero
from llm_distill.errors import InputError
from llm_distill.kinds import is_masked
from llm_distill.placement.choice import Facts
from llm_distill.signals import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def facts_of(
    config: PreTrainedConfig,
    name: str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Facts:
    """What a placement depends on.

    Args:
        config: Of the model, perhaps cut.
        name: For messages.
        dtype: Of the weights as they will load; `auto`: as the config says.
        trust_remote_code: Whether its class may come from its repository.
        quantize: How it is quantised as it loads.
    """
    model = skeleton(config, trust_remote_code=trust_remote_code)
    width, bits = dtype_of(config, dtype).itemsize, _bits(config)
    whole = quantising.bytes_of(model, width, quantize)
    spec = ModelSpec.of(config, name)
    try:
        path: str | None = blocks.find(model)
    except InputError:
        path = None
    return Facts(
        name=name,
        size=whole if bits is None else int(whole / width * bits / 8),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        splits=bool(model.tp_plan),
        blocks=path,
        quantised=bits is not None or quantize is not None,
        travels=quantize is None,
    )


def dtype_of(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """Of the weights as they will load; `auto`: as the config says."""
    kind = config.dtype if dtype == "auto" else dtype
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    return torch.float32 if kind is None else kind


def _bits(config: PreTrainedConfig) -> int | None:
    """Of most weights of a quantised checkpoint; None for others."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    told: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if told.get("load_in_4bit"):
        return 4
    return int(told.get("bits") or 8)


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config with its head, on no device: names and shapes alone."""
    auto: Any = AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM
    with torch.device("meta"), loading.quiet(), zero.aside():
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    return model
