"""Reading attention without eager attention.

A model's own attention function is wrapped under a name of its own in transformers' attention
interface: the output is untouched, and blocks marked with a `Tap` also hand over the query rows
that were asked for, the keys, and the mask, all after rotary embedding; for relations the whole
queries and the values as well. The mark stays on the module (a context flag would make a
checkpointed block save another number of tensors when it is recomputed), and the same operations
run in both passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_distill.attention import Heads
from llm_distill.queries import Queries

PREFIX = "llm_distill_"
MARK = "llm_distill_tap"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass
class Tap:
    """The mark on one attention module.

    Attributes:
        queries: Positions of the current batch; None: the module works as if unmarked.
        caught: What the last forward handed over.
        open: Whether a forward is running; a recomputation computes the same and keeps nothing.
        whole: Whether whole queries and values are kept as well.
    """

    queries: Queries | None = None
    caught: Heads | None = None
    open: bool = False
    whole: bool = False

    def take(
        self,
        module: nn.Module,
        vectors: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        """Keep the asked query rows `[B, H, R, d]`, the keys, and their part of the mask."""
        query, key, value = vectors
        if self.queries is None:
            return
        place = self.queries.position[:, None, :, None]
        rows = query.gather(2, place.expand(-1, query.shape[1], -1, query.shape[3]))
        scaling = options.get("scaling")
        heads = Heads(
            query=rows,
            key=key,
            mask=_mask_rows(module, mask, self.queries.position, key.shape[2], options),
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=options.get("softcap"),
            value=value if self.whole else None,
            whole_query=query if self.whole else None,
        )
        if self.open:
            self.caught = heads


def install(model: PreTrainedModel) -> None:
    """Route a model's attention through the wrapper of its implementation; twice is once.

    Raises:
        ValueError: If the model does not use transformers' attention interface.
    """
    base = str(model.config._attn_implementation)
    if base.startswith(PREFIX):
        return
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrapped(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its "
            "attention maps cannot be "
            "read; use Logits and HiddenStates with it"
        )


def discover(model: PreTrainedModel, run: Callable[[], object]) -> dict[int, nn.Module]:
    """Which attention module belongs to which block, from one run: 1..depth -> module."""
    seen: list[nn.Module] = []
    _OBSERVERS.append(seen.append)
    try:
        run()
    finally:
        _OBSERVERS.pop()
    found: dict[int, nn.Module] = {}
    for order, module in enumerate(seen):
        index = getattr(module, "layer_idx", None)
        found[(order if index is None else int(index)) + 1] = module
    return found


def mark(modules: Iterable[nn.Module]) -> list[Tap]:
    """Put a tap on each module, or find the one that is there."""
    taps = []
    for module in modules:
        if MARK not in module.__dict__:
            module.__dict__[MARK] = Tap()
        taps.append(cast("Tap", module.__dict__[MARK]))
    return taps


def clear(model: nn.Module) -> None:
    """Let every tap of a model forget its batch, whoever put it there."""
    for module in model.modules():
        tap = module.__dict__.get(MARK)
        if tap is not None:
            tap.queries = tap.caught = None


_OBSERVERS: list[Callable[[nn.Module], None]] = []
"""Filled only while `discover` runs a model."""


def _wrapped(base: str) -> Attention:
    """The attention function of one implementation, with taps."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        for observe in _OBSERVERS:
            observe(module)
        tap = module.__dict__.get(MARK)
        if tap is not None:
            tap.take(module, (query, key, value), attention_mask, options)
        return _own(base, module)(module, query, key, value, attention_mask, **options)

    return attend


def _own(base: str, module: nn.Module) -> Attention:
    """The function the model would have called; eager lives in the model's own file."""
    if base == "eager":
        return cast("Attention", sys.modules[type(module).__module__].eager_attention_forward)
    return cast("Attention", ALL_ATTENTION_FUNCTIONS[base])


def _mask_rows(
    module: nn.Module, mask: Tensor | None, position: Tensor, keys: int, options: dict[str, Any]
) -> Tensor | None:
    """The rows of the mask at the asked positions, `[B or 1, 1 or H, R, T]`; True: visible.

    Without a mask a causal module sees itself and the past (and its sliding window, where flash
    attention takes it as an argument); a two-dimensional mask marks the keys that are not padding.
    """
    if mask is not None and mask.dim() == 4:
        rows = position[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        return mask.expand(len(position), -1, -1, -1).gather(2, rows)[..., :keys]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    visible = None if mask is None else mask[:, None, None, :keys].bool()
    if causal:
        # Compared, never subtracted: a difference would be 8 bytes for each query and key.
        query, key = position[:, None, :, None], torch.arange(keys, device=position.device)
        past = key <= query
        window = options.get("sliding_window")
        if window is not None:
            past = past & (key > query - window)
        visible = past if visible is None else past & visible
    return visible
