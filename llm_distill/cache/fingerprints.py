"""What tells two tokenizers, chat templates, models or files apart."""

from __future__ import annotations

import json
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 1024
"""Numbers of each tensor that a model's fingerprint looks at."""

PIECE = 1 << 24
"""Bytes of a file that are read at a time."""

CUTS_TEXT = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
"""Parts of a fast tokenizer that decide its ids; padding and truncation change as it is used."""


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that turns text into ids."""
    backend: Any = vars(tokenizer).get("_tokenizer")
    parts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if backend is not None:
        whole = json.loads(backend.to_str())
        parts |= {name: whole.get(name) for name in CUTS_TEXT}
    else:
        parts["class"] = type(tokenizer).__name__
    return _digest(json.dumps(parts, sort_keys=True).encode())


def of_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its chat template; empty where it has none."""
    template = tokenizer.chat_template
    return "" if template is None else _digest(json.dumps(template, sort_keys=True).encode())


def of_weights(model: PreTrainedModel) -> str:
    """Of names, shapes, dtypes and numbers spread over each tensor; fast, whatever the size."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(_weights(model)):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta or isinstance(tensor, DTensor):
            continue  # not in memory, or not whole
        for part in _parts(tensor.detach()):
            flat = part.reshape(-1)
            step = max(1, flat.numel() // SAMPLES)
            digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    """Everything that a checkpoint would hold."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return model.state_dict().items()
    # bitsandbytes 0.50 changes 4-bit weights on a CPU whenever it writes their state dict.
    named = list(model.named_parameters())
    states = ((name, getattr(weight, "quant_state", None)) for name, weight in named)
    return named + [(f"{name}.absmax", state.absmax) for name, state in states if state is not None]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or the plain ones that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def of_file(path: Path, tick: Callable[[int], object] = int) -> str:
    """SHA-256 of a file.

    Args:
        path: The file.
        tick: Told of the bytes that were read, as they are.
    """
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            tick(len(piece))
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    """Of a text."""
    return blake2b(content, digest_size=16).hexdigest()
