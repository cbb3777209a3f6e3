"""Weights of some blocks of a teacher, from a loaded one or read from its files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.initialization import no_init_weights

from llm_distill import loading, zero
from llm_distill.capture import plain
from llm_distill.errors import InputError
from llm_distill.kinds import is_masked
from llm_distill.students.blocks import matching

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from llm_distill.teachers.local import Local


def copied(
    teacher: Local, made: PreTrainedConfig, blocks: Sequence[int], dtype: str
) -> PreTrainedModel:
    """A model of a cut config with the teacher's weights, on the CPU.

    Args:
        teacher: Loaded, or named: then only what is copied is read.
        made: The teacher's config with those blocks alone.
        blocks: The teacher's, 1..its depth.
        dtype: Of the weights.

    Raises:
        InputError: If the blocks cannot be found or change with their number, or if the weights
            are not all there.
    """
    if teacher.attn_implementation is not None:
        made._attn_implementation = teacher.attn_implementation
    kind = _kind(teacher)
    path = matching(kind, teacher.config, made, blocks)
    source = _read(kind, path, teacher, blocks, dtype)
    weights = _renumbered(source.state_dict(), path, blocks)
    _refuse_absent(weights, teacher)
    # Every weight is assigned below, so none is drawn, and no memory is written for it.
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model: Any = kind(made)
    loaded = not isinstance(teacher.model, str)
    model.load_state_dict(_owned(weights, dtype, copied=loaded), assign=True)
    model.tie_weights()
    model.config.dtype = getattr(torch, dtype)
    if model.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return cast("PreTrainedModel", model.eval())


def _kind(teacher: Local) -> type[PreTrainedModel]:
    """The class of a teacher, which need not be loaded."""
    if not isinstance(teacher.model, str):
        if isinstance(teacher.model, PeftModel):
            raise InputError(
                f"FromTeacher: the teacher {teacher.name} carries adapters; give "
                "teacher.merge_and_unload()"
            )
        return type(plain(teacher.model))
    auto: Any = AutoModelForMaskedLM if is_masked(teacher.config) else AutoModelForCausalLM
    with torch.device("meta"), zero.aside():
        return type(
            auto.from_config(
                copy.deepcopy(teacher.config), trust_remote_code=teacher.trust_remote_code
            )
        )


def _read(
    kind: type[PreTrainedModel], path: str, teacher: Local, blocks: Sequence[int], dtype: str
) -> Any:  # noqa: ANN401  a model of the teacher's class
    """A teacher with at least the chosen blocks in memory, under the teacher's own numbers.

    `from_pretrained` knows every way of storing weights (shards, old names, experts one by one,
    the Hub), and it reads no tensor that the model has no place for. So it gets the teacher's class
    with the other blocks taken out. A `key_mapping` to new numbers would have been shorter, but it
    sees names before they are put right, and `save_pretrained` would undo it.
    """
    if not isinstance(teacher.model, str):
        return plain(teacher.load())

    def thin(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  its class's own
        kind.__init__(self, config, *args, **kwargs)
        there = self.get_submodule(path)
        for index in set(range(len(there))) - {block - 1 for block in blocks}:
            there[index] = nn.Module()

    # One more class of the same name and module: by these transformers finds how to convert.
    body = {"__init__": thin, "__module__": kind.__module__}
    sparse: Any = type(kind.__name__, (kind,), body)
    options = {"revision": teacher.revision, "attn_implementation": teacher.attn_implementation}
    with loading.quiet(), zero.aside():
        try:
            model, told = sparse.from_pretrained(
                teacher.model,
                config=teacher.config,
                dtype=dtype,
                output_loading_info=True,
                **{key: value for key, value in options.items() if value is not None},
            )
        except OSError as error:
            raise InputError(
                f"the weights of {teacher.name!r} cannot be read: {loading.first_line(error)}"
            ) from error
    if told["missing_keys"]:
        raise InputError(
            f"FromTeacher: the weights of {teacher.name!r} have no {min(told['missing_keys'])}, "
            "which would start at random; take a whole checkpoint"
        )
    return model


def _renumbered(
    weights: Mapping[str, Tensor], path: str, blocks: Sequence[int]
) -> dict[str, Tensor]:
    """Weights of the chosen blocks under their new numbers, and those around them."""
    numbers = {str(block - 1): str(number) for number, block in enumerate(blocks)}
    made = {}
    for name, weight in weights.items():
        if not name.startswith(f"{path}."):
            made[name] = weight
            continue
        old, rest = name.removeprefix(f"{path}.").split(".", 1)
        if old in numbers:
            made[f"{path}.{numbers[old]}.{rest}"] = weight
    return made


def _refuse_absent(weights: Mapping[str, Tensor], teacher: Local) -> None:
    """Refuse weights that are not in memory."""
    absent = [name for name, weight in weights.items() if weight.is_meta]
    if absent:
        raise InputError(
            f"FromTeacher: {absent[0]} of the loaded teacher {teacher.name} is not in memory "
            "(offloaded by a device_map); give the teacher's id or path instead"
        )


def _owned(weights: Mapping[str, Tensor], dtype: str, *, copied: bool) -> dict[str, Tensor]:
    """Weights in the student's dtype on the CPU, sharing no memory with a loaded teacher."""
    wanted: torch.dtype = getattr(torch, dtype)
    return {
        name: weight.to("cpu", wanted if weight.is_floating_point() else weight.dtype, copy=copied)
        for name, weight in weights.items()
    }
