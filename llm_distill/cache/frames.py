"""Where the states of a layer lie: what is taken off them before they are kept in 8 bit.

States of language models have features that are a thousand times larger than others, and tokens
(attention sinks) whose states are a thousand times longer. A scale that serves all features of a
token would spend its 127 steps on these. So each feature is measured from its median in units of
its own spread, both from some thousand tokens and by medians, which sinks do not move; and what is
left out of line costs its block of 64 alone (`llm_distill.coded`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_distill.losses.softmax import wide

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE = "states.safetensors"

NORMAL = 1.4826
"""Standard deviation of a normal distribution, times its median absolute deviation."""

NARROWEST = 0.1
"""Of the median spread of all features: a feature that hardly moved may move elsewhere."""


@dataclass(frozen=True, eq=False)
class Frame:
    """The frame of one layer.

    Attributes:
        centre: Medians of its D features, `[D]`.
        scale: Spread of each number that is kept, `[W]`.
        basis: Orthonormal rows that states are projected on, `[W, D]`; None: W = D, all is kept.
    """

    centre: Tensor
    scale: Tensor
    basis: Tensor | None = None

    @classmethod
    def of(cls, states: Tensor, width: int | None = None) -> Frame:
        """The frame of some states: `[N, D] -> D features`, on the CPU.

        Args:
            states: Of tokens of all the data, if possible.
            width: Directions that are kept, those of the largest variance; None: all features.

        Source: Pearson 1901 (principal components).
        """
        states = states.double().cpu()
        centre = states.median(0).values
        left, basis = states - centre, None
        if width is not None:
            basis = _directions(left, width)
            left = left @ basis.T
        spread = NORMAL * (left - left.median(0).values).abs().median(0).values
        floor = NARROWEST * spread.median()
        scale = spread.clamp_min(float(floor) or 1.0)
        return cls(centre.float(), scale.float(), None if basis is None else basis.float())

    def numbers(self, states: Tensor) -> Tensor:
        """What is kept of states: `[N, D] -> [N, W]`, fp32."""
        left = states.float() - self.centre
        if self.basis is not None:
            left = left @ self.basis.T
        return left / self.scale

    def states(self, numbers: Tensor) -> Tensor:
        """States from what was kept of them: `[N, W] -> [N, D]`, fp32 or better.

        What was outside the kept directions stands at its median.
        """
        left = wide(numbers) * self.scale
        if self.basis is not None:
            left = left @ self.basis
        return left + self.centre

    def to(self, device: torch.device | str) -> Frame:
        """The same on a device."""
        basis = None if self.basis is None else self.basis.to(device)
        return Frame(self.centre.to(device), self.scale.to(device), basis)


def _directions(left: Tensor, width: int) -> Tensor:
    """The directions of the largest variance, in descending order: `[N, D] -> [W, D]`."""
    covariance = left.T @ left / max(len(left), 1)
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    found = vectors.flip(1)[:, :width].T
    # An eigenvector has no sign of its own; the same one in every process that looks.
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    directions: Tensor = found * largest.sign()
    return directions


def save(frames: Mapping[int, Frame], folder: Path) -> None:
    """Write the frames of layers into a folder."""
    tensors: dict[str, Tensor] = {}
    for layer, frame in frames.items():
        tensors |= {f"{layer}.centre": frame.centre, f"{layer}.scale": frame.scale}
        tensors |= {} if frame.basis is None else {f"{layer}.basis": frame.basis.contiguous()}
    save_file(tensors, folder / FILE)


def load(folder: Path) -> dict[int, Frame]:
    """What `save` wrote."""
    tensors = load_file(folder / FILE)
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {
        k: Frame(tensors[f"{k}.centre"], tensors[f"{k}.scale"], tensors.get(f"{k}.basis"))
        for k in layers
    }
