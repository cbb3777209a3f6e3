"""The language-model head of a model: where it is, what it does, and its weights whole."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from llm_distill.signals import Head

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def head_of(model: PreTrainedModel) -> Head:
    """The language-model head of a model: weight, bias, scale, soft cap, and what comes before it.

    Raises:
        ValueError: If there is no head, or if an adapter sits on it.
    """
    output = cast("nn.Module | None", model.get_output_embeddings())
    if isinstance(output, ModulesToSaveWrapper):
        output = output.modules_to_save[output.active_adapters[0]]
    if not isinstance(output, nn.Linear):
        what = (
            "no language-model head" if output is None else f"a {type(output).__name__} as its head"
        )
        raise ValueError(
            f"{type(model).__name__} has {what}; logits need a plain linear head (for LoRA, take "
            "the head out of "
            "target_modules, or put it into modules_to_save)"
        )
    config = model.config.get_text_config(decoder=True)
    division = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None)
    return Head(
        weight=_gathered(output.weight),
        bias=None if output.bias is None else _gathered(output.bias),
        scale=1.0 / float(division) if division else float(scale) if scale else 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
        transform=_transform_of(model),
    )


def _gathered(parameter: Tensor) -> Tensor:
    """A parameter whole, differentiably, where its shards lie on several ranks."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _transform_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """The layers between backbone and head that BERT and its kin have."""
    predictions = getattr(getattr(model, "cls", None), "predictions", None)
    transform = cast("nn.Module | None", getattr(predictions, "transform", None))
    if transform is None or not any(isinstance(p, DTensor) for p in transform.parameters()):
        return transform
    whole = {name: _gathered(p) for name, p in transform.named_parameters()}
    return partial(_called_with, transform, whole)


def _called_with(module: nn.Module, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """A module with other weights than its own."""
    return cast("Tensor", functional_call(module, weights, (hidden,)))
