"""Weights of which a process holds a piece: those of FSDP and tensor parallelism, and of ZeRO-3.

FSDP's are a class of their own. ZeRO-3 keeps the parameter and empties it: outside of the forward
of its module it has no numbers, and its piece stands beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 has a weight in its care, gathered now or not."""
    # What DeepSpeed goes by, in a form that torch.compile reads.
    return hasattr(weight, "ds_id")


def is_piece(weight: Tensor) -> bool:
    """Whether other processes hold a part of a weight.

    >>> is_piece(torch.zeros(2))
    False
    """
    return isinstance(weight, DTensor) or is_partitioned(weight)


def in_pieces(model: nn.Module | None) -> bool:
    """Whether the forward of a model is a collective call."""
    return model is not None and any(map(is_piece, model.parameters()))


def own_part(weight: Tensor) -> Tensor:
    """What this process keeps of a weight; changes to it are changes to the weight."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    return cast("Tensor", vars(weight)["ds_tensor"]) if is_partitioned(weight) else weight


def resident(weight: Tensor) -> int:
    """Bytes of a weight that this process holds now."""
    parts = [weight, own_part(weight)] if is_partitioned(weight) else [own_part(weight)]
    return sum(part.numel() * part.element_size() for part in parts)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the whole weight, whoever holds it."""
    return cast("torch.Size", vars(weight)["ds_shape"]) if is_partitioned(weight) else weight.shape


def whole(weight: Tensor) -> Tensor:
    """A weight whole, differentiably: a collective where it lies in pieces and is not gathered.

    Raises:
        RuntimeError: For a trained weight of ZeRO-3 that nobody lent (`lend`): it would have no
            gradient.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if not is_partitioned(weight):
        return weight
    gathered, trained = _is_gathered(weight), weight.requires_grad and torch.is_grad_enabled()
    if trained and not gathered:
        raise RuntimeError(
            "a weight in ZeRO-3's care is read for a gradient outside of the module that it was "
            "lent to; please report it"
        )
    if trained:
        return weight
    return weight.data if gathered else _gathered([weight])[0]  # stays when it is emptied


def lend(weights: Sequence[Tensor | None], module: nn.Module) -> None:
    """Have ZeRO-3 gather weights for the forward and backward of a module that is not theirs.

    Called in the forward of the module. The first time it is a collective; afterwards the weights
    are there when the forward begins, until the optimizer's step.

    Args:
        weights: Those that are not in ZeRO-3's care stay as they are.
        module: That reads them.
    """
    parts = [weight for weight in weights if weight is not None and is_partitioned(weight)]
    if not parts:
        return
    from deepspeed.runtime.zero import register_external_parameter

    for weight in parts:
        register_external_parameter(module, weight)
        if not _is_gathered(weight):
            cast("Any", weight).all_gather()
        # Else a tied embedding would give it back before it is read.
        vars(weight)["ds_active_sub_modules"].add(vars(module)["ds_id"])


def make_whole(model: nn.Module) -> None:
    """Give back to a model what ZeRO-3 emptied while it was loaded, the parameters themselves kept.

    A collective. A model that no engine runs yet cannot be read in pieces.

    Raises:
        InputError: For a model that an engine has run: its hooks would stay.
    """
    parts = [weight for weight in model.parameters() if is_partitioned(weight)]
    if parts and any("ds_id" in vars(module) for module in model.modules()):
        raise InputError(
            f"this {type(model).__name__} is in the hands of a DeepSpeed engine of before; save it "
            "(trainer.save_model()), and give the folder"
        )
    for weight, data in zip(parts, _gathered(parts), strict=True):
        for name in [name for name in vars(weight) if name.startswith("ds_")]:
            delattr(weight, name)
        weight.data = data


def _is_gathered(weight: Tensor) -> bool:
    """Whether a weight in ZeRO-3's care is whole here and now."""
    return str(vars(weight)["ds_status"].name) == "AVAILABLE"


def _gathered(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights in ZeRO-3's care, whole: the tensors stay when the parameters are emptied again."""
    if not weights:
        return []
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(weights)):
        return [weight.data for weight in weights]
