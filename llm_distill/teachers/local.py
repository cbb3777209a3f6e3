"""A model on this machine, loaded or named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import loading, quantising, zero
from llm_distill.capture import plain
from llm_distill.errors import InputError
from llm_distill.pieces import make_whole
from llm_distill.placement import (
    Facts,
    Placement,
    Shard,
    Spread,
    caps,
    check_device_map,
    check_spec,
    choose,
    compare,
    dtype_of,
    facts_of,
    is_word,
    launched,
    load_partitioned,
    load_sharded,
    own_places,
    skeleton,
)
from llm_distill.quantising import Quantize
from llm_distill.signals import ModelSpec, Request

if TYPE_CHECKING:
    import torch
    from torch import nn
from llm_distill.teachers.local_source import LocalSource

WHOLE = Placement("replica")
"""Of a model that lies where its one process trains, or where it was put before."""


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
        device_map: As in transformers, over CPU, disk, or the GPUs of one process. Of several each
            has its own copy: `auto` spreads it over its device, memory and disk, and a mapping
            names `cpu` and `disk` alone.
        shard: How a teacher lies on several processes. `replica`: whole on each. `fsdp2`: each
            keeps a piece of every block, and blocks are gathered one at a time; `hsdp`: the same
            inside each machine, with a copy on every machine; `tp`: the processes of a machine
            compute each layer together; `zero3`: in a run of DeepSpeed, an engine of its own
            keeps a piece of every weight, and gathers one layer at a time. `auto`: whole where
            that takes at most half of the free memory, else in pieces inside each machine; in one
            process over its device, memory and disk.
        shard_size: Processes that share a copy (`hsdp`) or a layer (`tp`); by default those of a
            machine.
        once_per_step: Whether a teacher reads all micro-batches of a step at once, which gathers
            its pieces once a step. It takes the activations of so many more sequences, and what it
            says of them is kept until they are trained on. It has no effect where a teacher takes
            turns on a device, or on an expert of `Routed`.
        attn_implementation: As in transformers.
        quantize: Load a teacher in fewer bits, its head and embedding excepted:
            `bitsandbytes_8bit`, `bitsandbytes_4bit`, `torchao_int8`, `torchao_int4`,
            `torchao_float8`. It lies whole on each process.
        measure_quantize: Whether the KL that this adds is measured before the training. That loads
            the whole checkpoint once, as it would lie without `quantize`.

    Raises:
        InputError: If the model is neither a name nor a transformers model, for an unknown dtype
            or way to quantise, or for a loaded model, one with a `device_map`, or a quantised one
            that shall lie in pieces.
    """

    model: str | PreTrainedModel
    tokenizer: str | PreTrainedTokenizerBase | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device_map: str | Mapping[str, Any] | None = None
    shard: Shard = "auto"
    shard_size: int | None = None
    once_per_step: bool = False
    attn_implementation: str | None = None
    quantize: Quantize | None = None
    measure_quantize: bool = True

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
        loaded = not isinstance(self.model, str)
        check_spec(self.shard, self.shard_size, self.device_map, loaded=loaded)
        if self.quantize is not None:
            quantising.check_spec(self.quantize, self.dtype, self.shard, loaded=loaded)

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
        self,
        request: Request | None = None,
        *,
        default_dtype: str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int] | None = None,
    ) -> PreTrainedModel:
        """The model, whole; with a request, without the head and upper blocks it does not need."""
        if not isinstance(self.model, str):
            make_whole(self.model)  # where it was loaded after the arguments of a ZeRO-3 run
            return self.model
        return loading.load_model(
            self.model,
            self._config_for(request),
            dtype=self.asked_dtype or default_dtype,
            backbone=request is not None and not request.logits,
            device_map=self.device_map or device_map,
            max_memory=max_memory,
            **self._options,
        )

    def check(self, request: Request, device: torch.device) -> None:
        """Refuse a placement that this launch or the model does not allow.

        Raises:
            InputError: Naming the teacher, and what to write instead.
        """
        check_device_map(self.device_map, self.name, quantised=self.quantize is not None)
        if self.quantize is not None:
            bare = skeleton(self.config, trust_remote_code=self.trust_remote_code)
            quantising.check(self.quantize, bare, self.name, device, self.device_map)
            if self.measure_quantize and request.logits:
                with quantising.measuring(self.quantize):
                    self.unquantised.check(Request(logits=True), device)
        placement, _ = self._placed(request, device)
        if zero.is_zero3() and (self.device_map is not None or placement.kind == "offload"):
            raise InputError(
                f"teacher {self.name}: device_map={self.device_map or 'auto'!r} beside a student "
                "under DeepSpeed ZeRO-3, which moves weights itself; write shard: replica, or "
                "start several processes and write shard: fsdp2"
            )

    def open(self, request: Request, device: torch.device) -> LocalSource:
        """Load for teaching.

        Raises:
            InputError: As `check`.
            ValueError: If the model cannot give a signal.
        """
        self.check(request, device)
        placement, facts = self._placed(request, device)
        told = (placement.describe(facts),) if placement.reason else ()
        if self.quantize is not None:
            whole = self.unquantised._facts(request)
            told = (*told, compare(self.quantize, self._facts(request), whole))
        spread = None
        if placement.pieces > 1:
            model = self._load_pieces(request, placement, facts)
            spread = Spread.of(model) if placement.tp > 1 else None
        else:
            model = self._load_whole(request, placement, device)
            stays = self.quantize is not None or self.device_map is not None
            if not stays and getattr(model, "hf_device_map", None) is None:
                cast("nn.Module", model).to(device)
        return LocalSource(
            model, request, self.name, device, spread=spread, told=told, ahead=self.once_per_step
        )

    def _load_pieces(self, request: Request, placement: Placement, facts: Facts) -> PreTrainedModel:
        """The pieces of the model that are this process's. A collective."""
        name, config = str(self.model), self._config_for(request)
        how = {"dtype": self.asked_dtype or "auto", "backbone": not request.logits, **self._options}
        if placement.kind == "zero3":
            return load_partitioned(name, config, **how)
        return load_sharded(name, config, placement, facts, **how)

    def _load_whole(
        self, request: Request, placement: Placement, device: torch.device
    ) -> PreTrainedModel:
        """The model on the device, or on it and wherever else there is room."""
        if self.quantize is not None:  # where it is loaded to: some of it may not travel
            return self.load(request, device_map={"": device})
        if placement.kind != "offload":
            return self.load(request)
        return self.load(request, device_map="auto", max_memory=caps(device, placement.room))

    def _placed(self, request: Request, device: torch.device) -> tuple[Placement, Facts]:
        """Where the weights go, and what that depends on. A collective."""
        mapped = self.device_map is not None
        if not isinstance(self.model, str) or (mapped and not is_word(self.device_map)):
            return WHOLE, Facts(self.name, 0)
        launch = launched(device)
        if launch.world == 1 and (mapped or self.shard == "replica"):
            return WHOLE, Facts(self.name, 0)
        facts = self._facts(request)
        if mapped:
            return own_places(str(self.device_map), launch), facts
        return choose(self.shard, self.shard_size, facts, launch), facts

    def _facts(self, request: Request) -> Facts:
        """What a placement depends on."""
        return facts_of(
            self._config_for(request),
            self.name,
            dtype=self.asked_dtype or "auto",
            trust_remote_code=self.trust_remote_code,
            quantize=self.quantize,
        )

    @property
    def unquantised(self) -> Local:
        """The same with all bits, wherever there is room for them."""
        where = None if self.device_map is None else "auto"
        return replace(self, quantize=None, shard="auto", device_map=where)

    @property
    def asked_dtype(self) -> str | None:
        """Of its weights, but for those that are quantised."""
        if self.quantize is None or self.dtype is not None:
            return self.dtype
        return quantising.KINDS[self.quantize].dtypes[0]

    def _config_for(self, request: Request | None) -> PreTrainedConfig:
        """The config, without the blocks that a request does not need."""
        return self.config if request is None else loading.cut_above(self.config, request)

    @property
    def _options(self) -> dict[str, Any]:
        """For `from_pretrained`."""
        how = None
        if self.quantize is not None:
            how = quantising.settings(
                self.quantize, dtype_of(self.config, self.asked_dtype or "auto")
            )
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": self.attn_implementation,
            "quantization_config": how,
        }
