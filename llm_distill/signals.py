"""What models say, how it is asked for, and what a config tells before weights load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor

from llm_distill.attention import Heads
from llm_distill.kinds import is_masked
from llm_distill.losses.blending import Combined
from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.several import Sparse
from llm_distill.losses.softmax import wide
from llm_distill.provenance import Provenance
from llm_distill.shapes import attends_by, head_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llm_distill.rows import Rows


@dataclass(frozen=True)
class Request:
    """Which signals are wanted; `|` is union.

    Attributes:
        logits: The next-token distribution of the supervised rows.
        hidden: Layers as in `hidden_states` of transformers: 0 the embedding, depth after the final
            norm.
        heads: Blocks 1..depth whose attention is wanted.
        relations: Those whose queries, keys and values are wanted whole; they are in `heads` too.
        members: What is wanted of single members of several teachers, ascending by their numbers.
        exits: Layers of a student whose states are wanted as next-token distributions, through its
            own final norm and head.

    >>> (Request(hidden=frozenset({2})) | Request(logits=True)).hidden
    frozenset({2})
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()
    relations: frozenset[int] = frozenset()
    members: tuple[tuple[int, Request], ...] = ()
    exits: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Whoever looks for blocks whose attention is read looks at `heads`."""
        object.__setattr__(self, "heads", self.heads | self.relations)

    def __or__(self, other: Request) -> Request:
        """Everything either asks for."""
        return Request(
            self.logits or other.logits,
            self.hidden | other.hidden,
            self.heads | other.heads,
            self.relations | other.relations,
            tuple(
                (k, self.member(k) | other.member(k))
                for k in sorted({k for k, _ in (*self.members, *other.members)})
            ),
            self.exits | other.exits,
        )

    def member(self, number: int) -> Request:
        """What is wanted of one member."""
        return dict(self.members).get(number, Request())

    def within(self, member: int | None) -> Request:
        """The same, wanted of a member of several teachers; None: of the teacher itself."""
        nothing = member is None or self == Request()
        return self if nothing else Request(members=((cast("int", member), self),))

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
        kv_heads: Heads of keys and values of a block.
        head_dim: Features of one head of queries and keys.
        value_dim: Features of one head of values.
        blocks: The teacher's block behind each of its own, for a student that was cut from it.
        fresh: Whether its weights are random.
        masked: Whether it is a masked language model.
        members: Those of several teachers, each of which has layers of its own.
    """

    name: str
    kind: str
    depth: int
    width: int
    heads: int
    vocabulary: int
    positions: int | None = None
    attends: bool = True
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    blocks: tuple[int, ...] | None = None
    fresh: bool = False
    masked: bool = False
    members: tuple[ModelSpec, ...] = ()

    def member(self, number: int | None) -> ModelSpec:
        """One of several teachers; itself for None."""
        return self if number is None else self.members[number]

    @classmethod
    def of(cls, config: PreTrainedConfig, name: str) -> ModelSpec:
        """Read a transformers config, the text part of a composite one."""
        text = config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        cut = Provenance.read(config)
        heads, kv_heads, head_dim, value_dim = head_shapes(text)
        return cls(
            name=name,
            kind=str(text.model_type),
            depth=int(text.num_hidden_layers),
            width=int(text.hidden_size),
            heads=heads,
            vocabulary=int(text.vocab_size),
            positions=int(positions) if positions else None,
            attends=attends_by(config),
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            blocks=None if cut is None else cut.blocks,
            masked=is_masked(config),
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

Distribution = Whole | Combined | Sparse
"""Whole, of one teacher or of several, or a few tokens of each row."""


@dataclass(frozen=True)
class Signals:
    """What one model said about one batch; asking for what was not requested raises.

    Attributes:
        source: Who speaks, for messages.
        members: What each of several teachers said, where it was asked for layers.
        exits: Next-token distributions of layers below the last.
    """

    source: str
    distribution: Distribution | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Heads] = field(default_factory=dict)
    members: tuple[Signals, ...] = ()
    exits: Mapping[int, Whole] = field(default_factory=dict)

    def member(self, number: int | None) -> Signals:
        """What one of several teachers said; everything for None."""
        return self if number is None else self.members[number]

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
        if not isinstance(found, Factored | Dense):
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
