"""Adapters that leave the base model what it is, so that it can teach: not all of them do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

KEPT = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Initialisations of LoRA that read base weights at most; others cut out what adapters start as."""

OF_THE_BASE = ("base_layer", "original_module")
"""What PEFT calls the base's part of a module that it wraps."""

INSTEAD = "or write teacher: BornAgain, a copy of the student as it begins"


def refuse_moving(config: PeftConfig, name: str) -> None:
    """Refuse adapters that come with another base model than the one that was loaded.

    Args:
        config: Of the adapters.
        name: Of the teacher, for messages.

    Raises:
        InputError: Saying what to write.
    """
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise InputError(
            f"{name}: bias: {bias} trains biases of the base model, which is the teacher and would "
            f"move with the student; write bias: none, {INSTEAD}"
        )
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower() not in KEPT:
        raise InputError(
            f"{name}: init_lora_weights: {start} rewrites the weights of the base model, which is "
            f"the teacher and would be another one from the start; write init_lora_weights: true, "
            f"{INSTEAD}"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise InputError(
            f"{name}: kasa_config cuts the weights of the base model, which is the teacher; leave "
            f"it out, {INSTEAD}"
        )


def refuse_unfrozen(model: PeftModel, name: str) -> None:
    """Refuse a student that trains weights of its base besides its adapters.

    Args:
        model: The student.
        name: Of the teacher, for messages.

    Raises:
        InputError: Naming the first of them.
    """
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for path, parameter in module.named_parameters()
        if not set(OF_THE_BASE).intersection(path.split("."))
    }
    prefix = getattr(model.base_model, "prefix", "")  # of what adapters share, outside of layers
    found = [
        path
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
        if not (prefix and any(part.startswith(prefix) for part in path.split(".")))
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise InputError(
            f"{name}: the student trains {found[0]}{more} of its base model, which is the teacher "
            "and would move; freeze them (requires_grad_(False)), train copies of whole modules "
            f"(modules_to_save), {INSTEAD}"
        )


def told(config: PeftConfig, name: str) -> tuple[str, ...]:
    """What somebody may not expect of adapters that are allowed, for the log."""
    for field in ("init_lora_weights", "init_weights"):
        if getattr(config, field, True) is False:
            return (
                f"teacher {name}: {field}: false lets the adapters start at random, so the student "
                "begins as another model than its base, which teaches it",
            )
    return ()
