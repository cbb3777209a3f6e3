"""Hidden states of a layer in a cache: bytes, what 8 bits lose, and reading speed, one thread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from llm_distill.cache.encoded import Encoded
    from llm_distill.cache.frames import Frame

HEADS = (
    "kept of a state",
    "bytes a token",
    "lost of a feature",
    "median feature",
    "lost of a token",
    "read, M tokens/s",
    "read and decoded",
    "the same, shuffled",
)
ABOUT = (
    "States: features with a spectrum k^-1/2, turned at random, around a mean of 0.3 N(0, 1); two "
    "features 600 and 250 standard deviations away, three 30 to 200 times wider, and each 128th "
    "token 3,000 standard deviations along a feature, as attention sinks are",
    "lost of a feature: squared error over the variance of the feature among plain tokens, mean "
    "and median over features; of a token: over its squared distance from the median state, mean "
    "over all tokens",
    "ours: medians and spreads of each feature from 4,096 other tokens, then a bf16 scale for "
    "every 64 numbers, with Parquet and zstd; the other two without",
)
CALIBRATED = 4096
"""Tokens that frames are made of."""


@dataclass(frozen=True)
class Kept:
    """Codec and frame of one layer, read as an estimator is.

    Attributes:
        name: Of the file.
        layers: Which numbers are kept (`Layers`, not imported before --help).
        frame: What they are measured from (`Frame`).
    """

    name: str
    layers: Any
    frame: Any

    def __str__(self) -> str:
        """In words."""
        kept = f"{self.layers.width:,} directions" if self.layers.projected else "all features"
        return f"ours, {kept}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the file."""
        names: tuple[str, ...] = self.layers.columns
        return names

    def decode(self, found: Sequence[Encoded], head: object) -> Tensor:
        """States of examples."""
        from llm_distill.cache.layers import coded

        del head
        read: Tensor = self.frame.states(coded(found, 1, self.layers.width).values())
        return read


def states(count: int, width: int, seed: int) -> Tensor:
    """States as those of a language model, the far features the same for each seed."""
    import torch

    shared = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=shared))
    mean = 0.3 * torch.randn(width, generator=shared)
    own = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, width + 1).float() ** -0.5
    found = (torch.randn(count, width, generator=own) * spectrum) @ turn.T + mean
    size = float(found.std())
    far, wide = [width // 60, width // 3], [width // 10, width // 2, width // 2 + 1]
    found[:, far] += size * torch.tensor([600.0, -250.0])
    found[:, wide] *= torch.tensor([60.0, 200.0, 30.0])
    found[::128, width // 5] += 3000.0 * size
    whole: Tensor = found
    return whole


def measure(options: argparse.Namespace, tell: Callable[[str], object]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    import torch

    from llm_distill.cache.frames import Frame

    tell(f"hidden states of {options.examples * options.length:,} tokens")
    every = states(CALIBRATED + options.examples * options.length, options.width, 1)
    seen, given = every[:CALIBRATED], list(every[CALIBRATED:].split(options.length))
    exact, centre = torch.cat(given), Frame.of(seen).centre
    plain = torch.arange(CALIBRATED, len(every)) % 128 != 0
    rows = []
    for name, block in (("a scale for a token", None), ("a scale for 64 numbers", 64)):
        size = options.width + 2 * (1 if block is None else -(-options.width // block))
        cells = _cells(_scaled(exact, block), exact, centre, plain)
        rows.append((name, f"{size:,}", *cells, "-", "-", "-"))
    for width in (None, min(256, options.width // 2)):
        tell(f"frame of {width or 'all'} directions")
        frame = Frame.of(seen, width)
        rows.append(_ours(frame, given, options, plain))
    return rows


def _ours(
    frame: Frame, given: Sequence[Tensor], options: argparse.Namespace, plain: Tensor
) -> tuple[str, ...]:
    """What the cache does."""
    import tempfile

    import torch

    from llm_distill.cache.encoded import Encoded, Fidelity
    from llm_distill.cache.layers import Layers
    from scripts.bench.cache import line

    layers = Layers((1,), "valid", options.width, len(frame.scale))
    kept: Any = Kept("states", layers, frame)
    found = [Encoded(len(each), 0, layers.encode({1: each}, {1: frame})[0]) for each in given]
    read = torch.cat([kept.decode([each], None) for each in found])
    with tempfile.TemporaryDirectory() as folder:
        encoded = [(each, Fidelity(each.rows)) for each in found]
        measured = line(kept, encoded, None, Path(folder), options)
    speeds = (f"{speed / 1e6:.3f}" for speed in measured.speeds)
    cells = _cells(read, torch.cat(list(given)), frame.centre, plain)
    return (str(kept), f"{measured.size:,.0f}", *cells, *speeds)


def _cells(read: Tensor, exact: Tensor, centre: Tensor, plain: Tensor) -> tuple[str, ...]:
    """What was lost, of features and of tokens."""
    error = (read - exact).square()
    feature = error[plain].mean(0) / exact[plain].var(0)
    token = error.sum(1) / (exact - centre).square().sum(1)
    return f"{feature.mean():.1e}", f"{feature.median():.1e}", f"{token.mean():.1e}"


def _scaled(values: Tensor, block: int | None) -> Tensor:
    """In 8 bit by the largest number of each token, or of each block of it."""
    import torch.nn.functional as F

    width = values.shape[1]
    size = width if block is None else block
    blocks = F.pad(values, (0, -width % size)).view(len(values), -1, size)
    steps = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    read: Tensor = ((blocks / steps).round() * steps).flatten(1)[:, :width]
    return read
