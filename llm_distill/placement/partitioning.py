"""Loading a frozen model under a second DeepSpeed engine, which keeps a piece of every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_distill import loading, zero
from llm_distill.errors import InputError
from llm_distill.placement.sharding import BACKBONE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""DeepSpeed's sections for the dtypes that it knows beside fp32."""

PERSISTENT = 10
"""Weights of at most so many numbers a feature stay whole: norms and biases, not worth a gather."""


class Backbone(nn.Module):
    """The root of an engine: all but the head runs in its forward, in one order.

    Args:
        model: With its head, which is read by itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:  # noqa: ANN401  what the backbone returns
        """Run the backbone."""
        return self.model.base_model(**inputs)


def load_partitioned(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str,
    backbone: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A frozen model of which this process holds its pieces, gathered layer by layer.

    A collective: every process of the run calls it.

    Args:
        name: Id or path.
        config: Of the model, perhaps cut.
        dtype: A torch dtype, its name, or `auto`: as the config says, else fp32.
        backbone: Leave the language-model head out.
        options: For `from_pretrained`.

    Raises:
        InputError: For a dtype that DeepSpeed has no engine for.
    """
    kind = config.dtype if dtype == "auto" else dtype
    kind = getattr(torch, kind) if isinstance(kind, str) else kind or torch.float32
    if kind not in (torch.float32, *HALVES.values()):
        raise InputError(
            f"teacher {name}: DeepSpeed keeps float32, bfloat16 and float16 in pieces, not "
            f"{loading.dtype_name(kind, name)}; write dtype: float32, or shard: fsdp2"
        )
    engine = engine_config(config, kind)
    model = loading.load_model(
        name, config, dtype=kind, backbone=backbone, engine=engine, **options
    )
    model.eval().requires_grad_(requires_grad=False)
    import deepspeed

    with zero.aside():
        running, *_ = deepspeed.initialize(model=Backbone(model), config=engine)
    # Not as a submodule: the engine holds the model. Without it, its hooks would be gone.
    model.__dict__[BACKBONE] = running.eval()
    return model


def engine_config(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration of an engine that only reads.

    Args:
        config: Of the model.
        dtype: Of its weights.
    """
    width = int(config.get_text_config(decoder=True).hidden_size)
    halves = {name: {"enabled": dtype == kind} for name, kind in HALVES.items()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": PERSISTENT * width,
        },
        **halves,
    }
