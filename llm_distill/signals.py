"""What models say, how it is asked for, and what a config tells before weights load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.softmax import wide
from llm_distill.losses.sparse import Counts, TopK

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llm_distill.rows import Queries, Rows


@dataclass(frozen=True)
class Request:
    """Which signals are wanted; `|` is union.

    Attributes:
        logits: The next-token distribution of the supervised rows.
        hidden: Layers as in `hidden_states` of transformers: 0 the embedding, depth after the final
            norm.
        heads: Blocks 1..depth whose attention is wanted.

    >>> (Request(hidden=frozenset({2})) | Request(logits=True)).hidden
    frozenset({2})
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()

    def __or__(self, other: Request) -> Request:
        """Everything either asks for."""
        return Request(
            self.logits or other.logits, self.hidden | other.hidden, self.heads | other.heads
        )

    @property
    def top(self) -> int:
        """The highest layer that has to run; logits need all, which the caller knows."""
        return max(self.hidden | self.heads, default=0)


@dataclass(frozen=True)
class ModelSpec:
    """What objectives need to know of a model, from its config alone.

    Attributes:
        name: For messages: the id, path, or class.
        kind: `model_type` of the config.
        depth: Blocks.
        width: Features of a hidden state.
        heads: Query heads of a block.
        vocabulary: Rows of the head, padding rows included.
        positions: Tokens a sequence may have at most, where the config says so.
        attends: Whether its attention can be read, through transformers' attention interface.
    """

    name: str
    kind: str
    depth: int
    width: int
    heads: int
    vocabulary: int
    positions: int | None = None
    attends: bool = True

    @classmethod
    def of(cls, config: PreTrainedConfig, name: str) -> ModelSpec:
        """Read a transformers config, the text part of a composite one."""
        text = config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        return cls(
            name=name,
            kind=str(text.model_type),
            depth=int(text.num_hidden_layers),
            width=int(text.hidden_size),
            heads=int(getattr(text, "num_attention_heads", 0)),
            vocabulary=int(text.vocab_size),
            positions=int(positions) if positions else None,
            attends=_attends(config),
        )


@dataclass(frozen=True)
class Head:
    """A language-model head: hidden state -> logits.

    Formula: `cap(scale * (transform(h) W^T + b))` with `cap(z) = softcap tanh(z / softcap)`.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: Factor on the logits (Cohere, Granite).
        softcap: Bound of the logits (Gemma 2).
        transform: What happens to the hidden state first (BERT's dense layer and norm).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def features(self, hidden: Tensor) -> Tensor:
        """What the weight is multiplied with: `[N, D] -> [N, D]`."""
        return hidden if self.transform is None else self.transform(hidden)

    @property
    def finish(self) -> Finish:
        """From the product with the weight to logits in fp32 or better: `[N, V] -> [N, V]`."""
        return Finish(self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """The whole way, for a few rows: `[N, D] -> [N, V]`."""
        return self.finish(
            F.linear(self.features(hidden).to(self.weight.dtype), self.weight, self.bias)
        )


@dataclass(frozen=True)
class Factored:
    """Next-token distributions of N rows as hidden states and a head."""

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        """Rows."""
        return len(self.hidden)

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows: `[n, V]`, fp32 or better."""
        return self.head.logits(self.hidden[rows])

    def projection(self) -> Projection:
        """What the pass over the head works on."""
        head = self.head
        return Projection(head.features(self.hidden), head.weight, head.bias, head.finish)


@dataclass(frozen=True)
class Dense:
    """Next-token distributions of N rows as logits `[N, V]`, for offloaded heads."""

    values: Tensor

    def __len__(self) -> int:
        """Rows."""
        return len(self.values)

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows: `[n, V]`, fp32 or better."""
        return wide(self.values[rows])


Whole = Factored | Dense
"""Logits of the whole vocabulary: as hidden states and head, or ready made."""

Distribution = Whole | TopK | Counts
"""Whole, or a few tokens of each row."""


@dataclass(frozen=True)
class Heads:
    """The attention of one block for the asked query positions, everything after rotary embedding.

    Attributes:
        query: `[B, H, R, d]`, the asked positions only.
        key: `[B, Hkv, T, d]`.
        mask: `[B or 1, 1 or H, R, T]`, boolean (True: visible) or additive, or None (all visible).
        scaling: Factor on the scores.
        softcap: Bound of the scores, before the mask.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None

    def maps(self, queries: Queries, part: slice = slice(None)) -> Tensor:
        """Attention probabilities of some asked rows, no dropout, fp32 or better: `[n, H, T]`.

        Args:
            queries: The positions this was captured for.
            part: Which of the R places of every sequence; all by default.
        """
        sequences, heads = self.query.shape[:2]
        query = wide(self.query[:, :, part])
        shared = query.unflatten(1, (self.key.shape[1], -1)).flatten(2, 3)
        scores = (shared @ wide(self.key).transpose(-1, -2)).view(
            sequences, heads, query.shape[2], -1
        )
        scores = scores * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        probabilities = self._masked(scores, part).softmax(-1)
        return probabilities.transpose(1, 2).flatten(0, 1).index_select(0, queries.flat_of(part))

    def _masked(self, scores: Tensor, part: slice) -> Tensor:
        """Scores with invisible keys at the lowest number, and biases of visible ones added."""
        if self.mask is None:
            return scores
        mask = self.mask[:, :, part]
        lowest = torch.finfo(scores.dtype).min
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, lowest)
        return (scores + mask).masked_fill(mask < -1e4, lowest)


@dataclass(frozen=True)
class Signals:
    """What one model said about one batch; asking for what was not requested raises.

    Attributes:
        source: Who speaks, for messages.
    """

    source: str
    distribution: Distribution | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Heads] = field(default_factory=dict)

    @property
    def logits(self) -> Distribution:
        """Next-token distributions of the supervised rows."""
        if self.distribution is None:
            raise LookupError(
                f"{self.source} was not asked for logits; put `logits=True` into the term's request"
            )
        return self.distribution

    @property
    def whole(self) -> Whole:
        """The same, of a model that gives them whole."""
        found = self.logits
        if isinstance(found, TopK | Counts):
            raise LookupError(
                f"{self.source} gives {type(found).__name__} targets, and whole logits are asked "
                "for; take a teacher that gives them"
            )
        return found

    def hidden(self, layer: int, rows: Rows) -> Tensor:
        """Hidden states of some rows: `[N, D]`."""
        if layer not in self.states:
            raise LookupError(
                f"{self.source} was not asked for hidden state {layer}; it has "
                f"{sorted(self.states)}"
            )
        return self.states[layer].flatten(0, 1).index_select(0, rows.index)

    def heads(self, layer: int) -> Heads:
        """Attention of one block."""
        if layer not in self.attention:
            raise LookupError(
                f"{self.source} was not asked for the heads of block {layer}; it has "
                f"{sorted(self.attention)}"
            )
        return self.attention[layer]


def _attends(config: PreTrainedConfig) -> bool:
    """Whether the class behind a config calls its attention through transformers' interface."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING):
        if type(config) in mapping:
            kind: Any = mapping[type(config)]
            return bool(kind._can_set_attn_implementation())
    return True
