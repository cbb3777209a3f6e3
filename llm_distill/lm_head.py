"""What follows the blocks of a model: its last norm, and its language-model head, whole."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from llm_distill.pieces import whole
from llm_distill.signals import Head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


def head_of(model: PreTrainedModel) -> Head:
    """The language-model head of a model: weight, bias, scale, soft cap, and what comes before it.

    Raises:
        ValueError: If there is no head, or if an adapter sits on it.
    """
    output = cast("nn.Module | None", model.get_output_embeddings())
    if isinstance(output, ModulesToSaveWrapper):
        off, own = output.disable_adapters, output.modules_to_save
        output = output.original_module if off else own[output.active_adapters[0]]
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
        weight=whole(output.weight),
        bias=None if output.bias is None else whole(output.bias),
        scale=1.0 / float(division) if division else float(scale) if scale else 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
        transform=_transform_of(model),
    )


@contextmanager
def last_norm(model: PreTrainedModel, *, asked: bool) -> Iterator[dict[int, nn.Module]]:
    """Watch which module gives the last hidden state, above all blocks; by the place of its output.

    Args:
        model: Runs meanwhile.
        asked: Whether anybody wants to know.
    """
    found: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # else their places would be given to others
    blocks = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            found[output.data_ptr()] = module
            kept.append(output)

    hooks = [
        module.register_forward_hook(note)
        for name, module in model.named_modules()
        if asked and not any(name.startswith(block) for block in blocks)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _transform_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """The layers between backbone and head that BERT and its kin have."""
    predictions = getattr(getattr(model, "cls", None), "predictions", None)
    transform = cast("nn.Module | None", getattr(predictions, "transform", None))
    if transform is None or not any(isinstance(p, DTensor) for p in transform.parameters()):
        return transform
    weights = {name: whole(p) for name, p in transform.named_parameters()}
    return partial(_called_with, transform, weights)


def _called_with(module: nn.Module, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """A module with other weights than its own."""
    return cast("Tensor", functional_call(module, weights, (hidden,)))
