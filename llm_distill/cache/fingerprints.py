"""What tells two tokenizers, chat templates, models or files apart."""

from __future__ import annotations

import json
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 1024
"""Numbers of each tensor that a model's fingerprint looks at."""

PIECE = 1 << 24
"""Bytes of a file that are read at a time."""

CUTS_TEXT = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
"""Parts of a fast tokenizer that decide its ids; padding and truncation change as it is used."""

CONFIG = "config.json"
WRITTEN_ANEW = ("transformers_version", "_name_or_path")
"""What a config says of whoever wrote it, and nothing of the model."""

BLOCK, BLOCKS = 1 << 12, 256
"""Bytes of a block, and how many of a file of weights are looked at, spread over it."""


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
    """Of names, shapes, dtypes and numbers spread over each tensor; fast, whatever the size.

    Of tensors that are not in memory here (offloaded, in pieces) the numbers do not count: what
    tells these apart is their files (`of_folder`).
    """
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


def of_folder(folder: Path) -> dict[str, str]:
    """Of the files that a model is loaded from, by their names: config, weights, code of its own.

    Some blocks of each are read, whatever its size, and no dates: a copy is the same model.
    """
    config = folder / CONFIG
    told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    paths += sorted(folder.glob("*.py")) if "auto_map" in told else []
    kept = {key: value for key, value in told.items() if key not in WRITTEN_ANEW}
    found = {CONFIG: _digest(json.dumps(kept, sort_keys=True).encode())} if told else {}
    return found | {path.name: _of_blocks(path) for path in paths}


def of_weights_alone(files: Mapping[str, str]) -> set[str]:
    """The names of the weights among the files of `of_folder`."""
    return {name for name in files if name.endswith((".safetensors", ".bin"))}


def compared(there: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between the files of two models, in words.

    >>> compared({"a.bin": "7 x", "b.bin": "9 y"}, {"a.bin": "7 z", "c.bin": "9 y"})
    ['a.bin (other content)', 'b.bin (not there now)', 'c.bin (not there then)']
    """
    told = {name: "other content" for name in there if now.get(name, there[name]) != there[name]}
    told |= {name: "not there now" for name in there if name not in now}
    told |= {name: "not there then" for name in now if name not in there}
    return [f"{name} ({words})" for name, words in sorted(told.items())]


def _of_blocks(path: Path) -> str:
    """Of a file: its size, its beginning, its end, and blocks between them."""
    size = path.stat().st_size
    digest = blake2b(str(size).encode(), digest_size=16)
    step = max(BLOCK, (size - BLOCK) // BLOCKS)
    with path.open("rb") as file:
        for start in [*range(0, max(size - BLOCK, 1), step), max(size - BLOCK, 0)]:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    """Of a text."""
    return blake2b(content, digest_size=16).hexdigest()
