"""What a config tells of attention: heads, their widths, and whether it can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def head_shapes(text: Any) -> tuple[int, int, int, int]:  # noqa: ANN401  configs differ
    """Query heads, heads of keys and values, and features of one head of either."""
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    if not heads:
        return 0, 0, 0, 0
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    # Latent attention (DeepSeek) has other widths for queries and keys than for values.
    query = int(getattr(text, "qk_head_dim", None) or width)
    return heads, kv_heads, query, int(getattr(text, "v_head_dim", None) or width)


def attends_by(config: PreTrainedConfig) -> bool:
    """Whether the class behind a config calls its attention through transformers' interface."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING):
        if type(config) in mapping:
            kind: Any = mapping[type(config)]
            return bool(kind._can_set_attn_implementation())
    return True
