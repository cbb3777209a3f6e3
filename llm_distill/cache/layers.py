"""Hidden states of layers in a cache: what is kept, as bytes, and what that was worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llm_distill.cache.columns import as_bytes
from llm_distill.coded import Coded, blocks_of
from llm_distill.rows import RowKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from llm_distill.cache.columns import Bytes
    from llm_distill.cache.encoded import Encoded
    from llm_distill.cache.frames import Frame

TINY = 1e-30
"""Of the distance of a state from its centre: one that is there has no error."""


@dataclass(frozen=True)
class Lost:
    """What the kept states of one layer lost, as sums over tokens.

    Attributes:
        tokens: How many.
        error: Squared distance of what is read from the state, as a share of the state's from the
            layer's median state.
        worst: The largest of these.
    """

    tokens: int = 0
    error: float = 0.0
    worst: float = 0.0

    def __add__(self, other: Lost) -> Lost:
        """Both together.

        >>> Lost(1, 0.5, 0.5) + Lost(2, 0.25, 0.125)
        Lost(tokens=3, error=0.75, worst=0.5)
        """
        both = self.tokens + other.tokens, self.error + other.error
        return Lost(*both, max(self.worst, other.worst))

    @property
    def mean(self) -> float:
        """Of a token."""
        return self.error / max(self.tokens, 1)


@dataclass(frozen=True)
class Layers:
    """Which states are kept.

    Attributes:
        layers: As in `hidden_states` of transformers, ascending.
        rows: Of which tokens: those that predict something, or all.
        features: Of a state.
        width: Numbers that are kept of a state.
    """

    layers: tuple[int, ...]
    rows: RowKind
    features: int
    width: int

    def __str__(self) -> str:
        """In words.

        >>> print(Layers((2, 4), "valid", 1024, 256))
        hidden states 2, 4 of all tokens, 256 of 1,024 numbers in 8 bit
        """
        tokens = "all" if self.rows == "valid" else "supervised"
        names = ", ".join(map(str, self.layers))
        part = f"{self.width:,} of " if self.projected else ""
        return f"hidden states {names} of {tokens} tokens, {part}{self.features:,} numbers in 8 bit"

    @property
    def projected(self) -> bool:
        """Whether less than all numbers are kept."""
        return self.width < self.features

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a shard."""
        return columns(self.layers)

    @property
    def token_bytes(self) -> float:
        """Bytes of a token, at most: before a compressor finds a little."""
        return float(len(self.layers) * (self.width + 2 * blocks_of(self.width)))

    @property
    def frame_bytes(self) -> float:
        """Bytes of the file that says what states are measured from (`frames.py`), about."""
        basis = self.width * self.features if self.projected else 0
        return 4.0 * len(self.layers) * (self.features + self.width + basis)

    def encode(
        self, states: Mapping[int, Tensor], frames: Mapping[int, Frame]
    ) -> tuple[dict[str, Bytes], dict[int, Lost]]:
        """States of one example as bytes, and what is lost of them: each layer `[M, D]`.

        Raises:
            ValueError: For a state with a number that is not finite.
        """
        found: dict[str, Bytes] = {}
        lost = {}
        for layer in self.layers:
            frame = frames[layer]
            try:
                coded = Coded.of(frame.numbers(states[layer]))
            except ValueError as error:
                raise ValueError(f"hidden state {layer} of the teacher: {error}") from error
            lost[layer] = _lost(states[layer], frame.states(coded.values()), frame)
            codes, scales = columns((layer,))
            found[codes] = as_bytes(coded.codes.cpu().numpy())
            found[scales] = as_bytes(coded.scales.cpu().view(torch.int16).numpy())
        return found, lost

    def written(self) -> dict[str, Any]:
        """As a manifest has it."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def read(cls, text: Mapping[str, Any]) -> Layers:
        """What `written` wrote."""
        return cls(**{**text, "layers": tuple(text["layers"])})


def columns(layers: Sequence[int]) -> tuple[str, ...]:
    """Of a shard with these layers.

    >>> columns([3])
    ('state_3', 'state_3_scales')
    """
    return tuple(name for k in layers for name in (f"state_{k}", f"state_{k}_scales"))


def coded(found: Sequence[Encoded], layer: int, width: int) -> Coded:
    """The states of examples, token after token."""
    names = columns((layer,))
    codes = [part.columns[names[0]].view(np.int8).reshape(-1, width) for part in found]
    blocks = blocks_of(width)
    scales = [part.columns[names[1]].view(np.int16).reshape(-1, blocks) for part in found]
    codes = codes or [np.zeros((0, width), np.int8)]
    scales = scales or [np.zeros((0, blocks), np.int16)]
    whole = torch.from_numpy(np.concatenate(codes)), torch.from_numpy(np.concatenate(scales))
    return Coded(whole[0], whole[1].view(torch.bfloat16))


def _lost(states: Tensor, read: Tensor, frame: Frame) -> Lost:
    """What is lost: `[M, D] x2`."""
    if not len(states):
        return Lost()
    exact = states.double()
    away = (exact - frame.centre).square().sum(-1)
    error = (exact - read).square().sum(-1) / away.clamp_min(TINY)
    return Lost(len(states), float(error.sum()), float(error.amax()))
