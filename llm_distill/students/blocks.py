"""The blocks of a model: where they are, a config with fewer, and whether a block stays itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from llm_distill.blocks import find
from llm_distill.errors import InputError
from llm_distill.loading import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

PLAIN = (bool, int, float, str, type(None))
"""Values that say how a module computes, beside its tensors and parts."""


NUMBERED = ("mlp_only_layers", "moe_layers")
"""What lists numbers of blocks, from 0 on, rather than something for each."""


def cut(config: PreTrainedConfig, blocks: Sequence[int]) -> PreTrainedConfig:
    """A config with some blocks (1..depth) of another one; what it lists by block is cut along."""
    made = copy.deepcopy(config)
    text: Any = made.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    for name, value in text.to_dict().items():
        listed = isinstance(value, list | tuple) and len(value) == depth
        if listed and ("layer" in name or "block" in name) and name not in NUMBERED:
            setattr(text, name, [value[block - 1] for block in blocks])
    _keep_dense(text, blocks)
    text.num_hidden_layers = len(blocks)
    made.name_or_path = ""  # its weights are not from there
    return made


def matching(
    kind: type[PreTrainedModel],
    whole: PreTrainedConfig,
    made: PreTrainedConfig,
    blocks: Sequence[int],
) -> str:
    """Where the blocks of a model are, once it is known that a cut one computes with the same.

    Both models are made on a device that holds nothing, the cut one from its config as it would be
    read again; then every part of every block is compared: class, shapes, and plain values such as
    windows and scales. So families whose blocks depend on their number are found without a list.

    Raises:
        InputError: Naming the class, and the block and part that would not be the same.
    """
    with torch.device("meta"):
        teacher: Any = kind(copy.deepcopy(whole))
        path = find(teacher)
        try:
            student: Any = kind(type(made).from_dict(made.to_dict()))
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise _entangled(kind, f"its config says: {first_line(error)}") from error
    around = _shapes(teacher, path), _shapes(student, path)
    if around[0] != around[1]:
        name = next(n for n, _ in sorted(around[0].items() ^ around[1].items()))
        raise _entangled(kind, f"the shape of {name} depends on the number of blocks")
    pairs = zip(student.get_submodule(path), blocks, strict=True)
    for number, (ours, block) in enumerate(pairs, start=1):
        part = _difference(teacher.get_submodule(path)[block - 1], ours, {(block, number)})
        if part is not None:
            said = f"block {block} would be another one as block {number}: {part} differs"
            raise _entangled(kind, said)
    return path


def _keep_dense(text: Any, blocks: Sequence[int]) -> None:  # noqa: ANN401  a config
    """Keep blocks with experts with them and others without, where numbers say which they are."""
    if getattr(text, "mlp_only_layers", None) is not None:  # Qwen-MoE: these, and between steps
        step = getattr(text, "decoder_sparse_step", 1)
        dense = [block - 1 in text.mlp_only_layers or block % step > 0 for block in blocks]
        text.mlp_only_layers = [number for number, without in enumerate(dense) if without]
        text.decoder_sparse_step = 1
    if getattr(text, "moe_layers", None) is not None:  # Llama 4
        text.moe_layers = [n for n, block in enumerate(blocks) if block - 1 in text.moe_layers]
    if getattr(text, "first_k_dense_replace", None) is not None:  # DeepSeek, GLM
        text.first_k_dense_replace = sum(b <= text.first_k_dense_replace for b in blocks)


def _shapes(model: nn.Module, path: str) -> dict[str, torch.Size]:
    """Shapes of what is saved, but for the blocks."""
    saved = model.state_dict()
    return {name: t.shape for name, t in saved.items() if not name.startswith(f"{path}.")}


def _difference(theirs: nn.Module, ours: nn.Module, numbers: set[tuple[int, int]]) -> str | None:
    """The first part of two blocks that differs; their own numbers may."""
    numbers = numbers | {(block - 1, number - 1) for block, number in numbers}
    one, other = dict(theirs.named_modules()), dict(ours.named_modules())
    for name in [*one, *other]:
        if name not in one or name not in other or type(one[name]) is not type(other[name]):
            return name or type(ours).__name__
        values = _values(one[name]), _values(other[name])
        for key in {**values[0], **values[1]}:
            pair = values[0].get(key), values[1].get(key)
            if pair[0] != pair[1] and pair not in numbers:
                return f"{name}.{key}".lstrip(".")
    return None


def _values(module: nn.Module) -> dict[str, Any]:
    """Plain values of a module, and the shapes of its own tensors."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)}
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return plain | {name: tensor.shape for name, tensor in tensors}


def _entangled(kind: type[PreTrainedModel], why: str) -> InputError:
    """Say that a family cannot be cut."""
    return InputError(
        f"FromTeacher: {kind.__name__} cannot be cut to these blocks; {why}; choose others, or "
        "write student: {FromConfig: …}, or name a model"
    )
