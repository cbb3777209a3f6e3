"""Models in fewer bits: the words for it, what each needs, and how small it makes a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.import_utils import is_bitsandbytes_available, is_torchao_available

from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

Quantize = Literal[
    "bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8", "torchao_int4", "torchao_float8"
]
"""What may be asked for."""

GROUP = 64
"""Weights that share a scale in four bits."""


@dataclass(frozen=True)
class Kind:
    """How weights are quantised.

    Attributes:
        library: That does it.
        bits: Of a quantised weight, with the scales of groups.
        row_bits: Of the scale of an output feature.
        dtypes: That everything else may have; the first where nothing was asked for.
        capability: The least CUDA device that can do it; None: any device.
        transposed: Whether GPT-2's layers, which hold their weight transposed, are quantised too.
        multiples: Of input and output features; other layers stay whole.
    """

    library: Literal["bitsandbytes", "torchao"]
    bits: float
    row_bits: int = 0
    dtypes: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
    capability: tuple[int, int] | None = None
    transposed: bool = False
    multiples: tuple[int, int] = (1, 1)


# The scales of four bits are quantised again: 8 bits for 64 weights, 32 for 256 of these.
_NF4 = 4 + 8 / GROUP + 32 / (256 * GROUP)

KINDS: dict[str, Kind] = {
    "bitsandbytes_8bit": Kind("bitsandbytes", 8, row_bits=32, transposed=True),
    "bitsandbytes_4bit": Kind("bitsandbytes", _NF4, transposed=True),
    "torchao_int8": Kind("torchao", 8, row_bits=40),  # scale and zero point
    "torchao_int4": Kind(
        "torchao", 4 + 32 / GROUP, dtypes=("bfloat16",), capability=(8, 0), multiples=(GROUP, 8)
    ),
    "torchao_float8": Kind(
        "torchao", 8, row_bits=32, dtypes=("bfloat16",), capability=(8, 9), multiples=(16, 16)
    ),
}
"""By their words."""

PACKED_ON_CPU = (GROUP, 32)
"""Multiples of input and output features that bitsandbytes needs for four bits on a CPU."""


def check_spec(word: str, dtype: str | None, shard: str, *, loaded: bool) -> None:
    """Refuse what is no word, or does not go with the rest of a spec.

    Raises:
        InputError: With the words there are, or what to leave out.
    """
    if word not in KINDS:
        raise InputError(
            f"Local: quantize is {word!r}; write one of {', '.join(get_args(Quantize))}"
        )
    allowed = KINDS[word].dtypes
    if dtype is not None and dtype not in allowed:
        raise InputError(
            f"Local: quantize={word!r} and dtype={dtype!r}: what is not quantised is computed in "
            f"{' or '.join(each for each in allowed if each != 'auto')}; leave dtype out"
        )
    if loaded:
        raise InputError(
            f"Local: quantize={word!r} is for models that are loaded here, and this one is loaded; "
            "give its id or path, or quantise it as you load it"
        )
    if shard not in ("auto", "replica"):
        raise InputError(
            f"Local: quantize={word!r} and shard={shard!r}: quantised weights cannot lie in "
            "pieces; write shard: replica, or leave one of the two out"
        )


def check(
    word: str,
    model: PreTrainedModel,
    name: str,
    device: torch.device,
    device_map: str | Mapping[str, Any] | None = None,
) -> None:
    """Refuse what cannot be done here, before any weights load.

    Args:
        word: What was asked for.
        model: Without weights.
        name: Of the teacher, for messages.
        device: Where it shall lie.
        device_map: Where each part of it shall lie, if that was said.

    Raises:
        InputError: Saying what is missing, and what to write instead.
    """
    kind, asked = KINDS[word], f"teacher {name}: quantize={word!r}"
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"{asked}, and its checkpoint is quantised already; leave quantize out, or name the "
            "checkpoint it was made from"
        )
    if not _installed(kind):
        raise InputError(
            f"{asked} needs {kind.library}, which is not installed here or is too old; pip install "
            "'llm-distill[quantize]'"
        )
    least = kind.capability
    if least is not None and (device.type != "cuda" or _capability(device) < least):
        number = ".".join(map(str, least))
        raise InputError(
            f"{asked} needs an NVIDIA GPU of compute capability {number} or newer, and this "
            f"process trains on {_shown(device)}; write "
            f"{'bitsandbytes_4bit' if kind.bits < 8 else 'torchao_int8'}"
        )
    places = set(device_map.values()) if isinstance(device_map, Mapping) else set()
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise InputError(
            f"{asked} and a device_map with parts in memory or on disk: quantised weights stay on "
            "the device; leave device_map out, or spread it over GPUs alone"
        )
    _check_layers(word, model, asked, device)


def _check_layers(word: str, model: PreTrainedModel, asked: str, device: torch.device) -> None:
    """Refuse a model in which nothing would be quantised, or layers of a shape that cannot be."""
    sizes = [size for _, size in layers(word, model)]
    if not sizes:
        raise InputError(
            f"{asked} would leave all of its weights as they are: {type(model).__name__} has no "
            f"linear layers that {KINDS[word].library} takes; "
            + ("leave it out" if KINDS[word].transposed else "write bitsandbytes_8bit")
        )
    packed = word == "bitsandbytes_4bit" and device.type == "cpu"
    odd = [s for s in sizes if any(n % m for n, m in zip(s, PACKED_ON_CPU, strict=True))]
    if packed and odd:
        raise InputError(
            f"{asked} on a CPU takes layers whose inputs are a multiple of {PACKED_ON_CPU[0]} and "
            f"whose outputs one of {PACKED_ON_CPU[1]}, and there is one of {odd[0][0]} and "
            f"{odd[0][1]}; write bitsandbytes_8bit"
        )


@contextmanager
def measuring(word: str) -> Iterator[None]:
    """Say why a checkpoint has to lie here whole, if only for a moment."""
    try:
        yield
    except InputError as error:
        why = str(error).partition(";")[0]
        raise InputError(
            f"what quantize={word!r} adds is measured, for which the checkpoint is loaded once as "
            f"it is, and {why}; write measure_quantize: false"
        ) from error


def settings(word: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    """What `from_pretrained` is told, the head and the embedding staying as they are.

    Args:
        word: What was asked for.
        dtype: Of everything that is not quantised; products of 4-bit weights are in it.
    """
    if KINDS[word].library == "torchao":
        return TorchAoConfig(_torchao(word))
    if word == "bitsandbytes_8bit":
        # With bf16 and fp32 inputs it would say of every product that they are cast to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def layers(word: str, model: PreTrainedModel) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The weights that would be quantised, with their input and output features.

    Args:
        word: What was asked for.
        model: With or without weights, not quantised yet.
    """
    kind = KINDS[word]
    fp32 = list(model._keep_in_fp32_modules or ())
    kept = HfQuantizer.get_modules_to_not_convert(model, None, fp32)
    for name, module in model.named_modules():
        if not should_convert_module(name, kept):
            continue
        if isinstance(module, nn.Linear):
            size = module.in_features, module.out_features
        elif isinstance(module, Conv1D) and kind.transposed:
            size = module.nx, module.nf
        else:
            continue
        if not any(n % multiple for n, multiple in zip(size, kind.multiples, strict=True)):
            yield module.weight, size


def bytes_of(model: PreTrainedModel, width: int, word: str | None = None) -> int:
    """Bytes of a model's weights.

    Args:
        model: Without weights.
        width: Bytes of a weight that is not quantised.
        word: How the others are.
    """
    sizes = {id(p): float(p.numel() * width) for p in model.parameters()}
    if word is not None:
        kind = KINDS[word]
        for weight, (_, outputs) in layers(word, model):
            sizes[id(weight)] = (weight.numel() * kind.bits + outputs * kind.row_bits) / 8
    return int(sum(sizes.values()))


def _torchao(word: str) -> Any:  # noqa: ANN401  a config of torchao, which is perhaps not installed
    """The settings of torchao, which leave those of the compiler alone."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    if word == "torchao_int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if word == "torchao_float8":
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
    # Of the packings the one whose kernel comes with torch; the plain one needs mslk.
    return Int4WeightOnlyConfig(
        group_size=GROUP,
        int4_packing_format="tile_packed_to_4d",
        int4_choose_qparams_algorithm="hqq",
        set_inductor_config=False,
    )


def _installed(kind: Kind) -> bool:
    """Whether the library is there, as new as transformers needs it."""
    there = is_torchao_available if kind.library == "torchao" else is_bitsandbytes_available
    return bool(there())


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def _shown(device: torch.device) -> str:
    """A device in words."""
    if device.type != "cuda":
        return device.type
    return f"one of {'.'.join(map(str, _capability(device)))}"


def _is_no_cast(record: logging.LogRecord) -> bool:
    """Whether a message is worth showing."""
    return "inputs will be cast" not in record.getMessage()
