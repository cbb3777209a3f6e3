"""Where the blocks of a transformers model are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find(model: PreTrainedModel) -> str:
    """The path of the list of blocks, `model.layers`.

    Raises:
        InputError: If there is no list of as many modules as the config says, or more than one.
    """
    text = model.config.get_text_config(decoder=True)
    root = "" if text is model.config else _text_part(model, str(text.model_type))
    depth = text.num_hidden_layers
    found = [
        name
        for name, module in model.get_submodule(root).named_modules(prefix=root)
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    top = min((name.count(".") for name in found), default=0)
    found = [name for name in found if name.count(".") == top]
    if len(found) != 1:
        there = f"are {len(found)}, {', '.join(found)}" if found else "is none"
        raise InputError(
            f"the {depth} blocks of {type(model).__name__} are not to be found; one list of "
            f"{depth} modules was looked for, there {there}; write student: "
            "{FromConfig: …}, or name a model, and leave blockwise out"
        )
    path: str = found[0]
    return path


def _text_part(model: PreTrainedModel, kind: str) -> str:
    """The path of the language model in a composite one; the whole where it is not set apart."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "model_type", None) == kind:
            return str(name)
    return ""
