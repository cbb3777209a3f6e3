"""A model on this machine, loaded or named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import loading
from llm_distill.capture import Reader, plain
from llm_distill.errors import InputError
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.signals import (
    Dense,
    Distribution,
    Factored,
    Head,
    ModelSpec,
    Request,
    Signals,
)

if TYPE_CHECKING:
    from llm_distill.attention import Heads
    from llm_distill.rows import Batch


@dataclass(frozen=True)
class Local:
    """A model of this machine; as a teacher it is frozen and in evaluation mode.

    Attributes:
        model: A Hub id, a path, or a loaded model.
        tokenizer: Of the model, where it does not lie beside it: an id, a path, or a loaded one.
        dtype: `float32`, `bfloat16`, `float16` or `auto` (the checkpoint's). By default a teacher
            keeps its checkpoint's dtype and a student gets fp32 master weights.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code from the repository of this model; never by default.
        device_map: As in transformers, over CPU, disk, or the GPUs of one process.
        attn_implementation: As in transformers.

    Raises:
        InputError: If the model is neither a name nor a transformers model, or for an unknown
            dtype.
    """

    model: str | PreTrainedModel
    tokenizer: str | PreTrainedTokenizerBase | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device_map: str | Mapping[str, Any] | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a model."""
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        elif not isinstance(self.model, str) and not isinstance(plain(self.model), PreTrainedModel):
            raise InputError(
                f"{type(self.model).__name__} is no model; give a Hub id, a path, or a loaded "
                "transformers model"
            )
        if self.dtype is not None:
            dtype = loading.dtype_name(self.dtype, "Local", allowed=("auto", *loading.DTYPES))
            object.__setattr__(self, "dtype", dtype)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model."""
        if not isinstance(self.model, str):
            return plain(self.model).config
        return loading.load_config(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    @property
    def name(self) -> str:
        """For messages: the id or path, else the class."""
        if isinstance(self.model, str):
            return self.model
        return str(self.config.name_or_path or type(plain(self.model)).__name__)

    @property
    def spec(self) -> ModelSpec:
        """Depth, width and heads, from the config."""
        return ModelSpec.of(self.config, self.name)

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """The tokenizer that was given, or that lies beside the model; None where neither is.

        Raises:
            InputError: If one was named that cannot be read.
        """
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            return self.tokenizer
        beside = self.model if isinstance(self.model, str) else self.config.name_or_path
        if self.tokenizer is None or self.tokenizer == beside:
            return loading.find_tokenizer(
                beside, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        found = loading.find_tokenizer(self.tokenizer)  # revision and trust are the model's alone
        if found is None:
            raise InputError(
                f"tokenizer {self.tokenizer!r} of {self.name} cannot be read, as a local folder or "
                "a Hub id; give another, or a loaded one"
            )
        return found

    def load(
        self, request: Request | None = None, *, default_dtype: str = "auto"
    ) -> PreTrainedModel:
        """The model; with a request, without the head and upper blocks it does not need."""
        if not isinstance(self.model, str):
            return self.model
        config = self.config if request is None else loading.cut_above(self.config, request)
        return loading.load_model(
            self.model,
            config,
            dtype=self.dtype or default_dtype,
            backbone=request is not None and not request.logits,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
        )

    def open(self, request: Request, device: torch.device) -> LocalSource:
        """Load for teaching.

        Raises:
            InputError: For a `device_map` under several processes.
            ValueError: If the model cannot give a signal.
        """
        if self.device_map is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"teacher {self.name}: device_map={self.device_map!r} with several processes would "
                "put every process's "
                "copy on the same devices; leave device_map out, or start one process"
            )
        model = self.load(request)
        if self.device_map is None and getattr(model, "hf_device_map", None) is None:
            cast("nn.Module", model).to(device)
        return LocalSource(model, request, self.name, device)


class LocalSource:
    """A frozen model at work.

    Args:
        model: Set to evaluation mode and frozen here.
        request: What is read from it.
        name: For messages.
        device: Where the signals are wanted.
    """

    def __init__(
        self, model: PreTrainedModel, request: Request, name: str, device: torch.device
    ) -> None:
        self.model: PreTrainedModel | None = model.eval().requires_grad_(requires_grad=False)
        self.device, self._name = device, name
        self._reader: Reader | None = None
        self.ask(request)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signals:
        """Signals of one batch, on the device of the training."""
        if self._reader is None:
            raise RuntimeError("this teacher was closed; open it again")
        signals = self._reader.read(batch)
        self._reader.release()
        return moved(signals, self.device)

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for."""
        if self.model is None:
            raise RuntimeError("this teacher was closed; open it again")
        self._reader = Reader(self.model, request, f"teacher {self._name}")

    def close(self) -> None:
        """Let the weights go; twice is once."""
        self.model = self._reader = None


def moved(signals: Signals, device: torch.device) -> Signals:
    """The same signals on a device; no copy where they are there already."""

    def to(tensor: Tensor | None) -> Any:  # noqa: ANN401  None stays None
        return None if tensor is None else tensor.to(device)

    def distribution(value: Distribution | None) -> Distribution | None:
        if value is None:
            return None
        if isinstance(value, Dense):
            return Dense(to(value.values))
        if isinstance(value, TopK | Counts):
            return value.to(device)
        if not isinstance(value, Factored):  # of several teachers, which see to it themselves
            return value
        head: Head = replace(value.head, weight=to(value.head.weight), bias=to(value.head.bias))
        return Factored(to(value.hidden), head)

    def heads(value: Heads) -> Heads:
        return replace(
            value,
            query=to(value.query),
            key=to(value.key),
            mask=to(value.mask),
            value=to(value.value),
            whole_query=to(value.whole_query),
        )

    return Signals(
        signals.source,
        distribution(signals.distribution),
        {layer: to(state) for layer, state in signals.states.items()},
        {layer: heads(value) for layer, value in signals.attention.items()},
    )
