"""Numbers in 8 bit, a scale for every 64 of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Numbers that share a scale: one of them that is far larger costs 63 others their precision."""

MOST = 127
"""The largest code."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Rows of numbers in 8 bit.

    Attributes:
        codes: `[N, W]` int8, from -127 to 127.
        scales: `[N, ceil(W / 64)]` bf16, what a step of the codes is worth.

    >>> coded = Coded.of(torch.tensor([[1.0, -0.5, 0.004]]))
    >>> coded.codes, coded.values()
    (tensor([[126, -63,   1]], dtype=torch.int8), tensor([[ 0.9998, -0.4999,  0.0079]]))
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Coded:
        """The nearest codes: `[N, W] -> N rows`.

        The scale is rounded up before the codes are chosen in its units, so that its own rounding
        costs a code or two of 127 and no precision besides.

        Raises:
            ValueError: For numbers that are not finite.
        """
        if not bool(values.isfinite().all()):
            raise ValueError("numbers that are not finite have no code")
        width = values.shape[1]
        blocks = _blocks(values.float())
        largest = blocks.abs().amax(-1) / MOST
        scales = largest.bfloat16()
        up = torch.nextafter(scales, torch.full_like(scales, torch.inf))
        scales = torch.where(scales.float() < largest, up, scales)
        step = torch.where(scales == 0, 1.0, scales.float())  # nothing but zeros
        codes = (blocks / step[:, :, None]).round().clamp(-MOST, MOST)
        return cls(codes.to(torch.int8).flatten(1)[:, :width], scales)

    def values(self) -> Tensor:
        """The numbers: `[N, W]` fp32."""
        width = self.codes.shape[1]
        steps = self.scales.float().repeat_interleave(BLOCK, 1)[:, :width]
        return self.codes.float() * steps

    def __len__(self) -> int:
        """Rows."""
        return len(self.codes)

    def rows(self, part: slice) -> Coded:
        """Some of them."""
        return Coded(self.codes[part], self.scales[part])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Coded:
        """The same on a device."""
        return Coded(*(t.to(device, non_blocking=non_blocking) for t in (self.codes, self.scales)))

    def pin_memory(self, device: str | None = None) -> Coded:
        """The same in page-locked memory, for the DataLoader."""
        del device
        return Coded(self.codes.pin_memory(), self.scales.pin_memory())


def blocks_of(width: int) -> int:
    """Scales of a row.

    >>> blocks_of(64), blocks_of(65)
    (1, 2)
    """
    return -(-width // BLOCK)


def _blocks(values: Tensor) -> Tensor:
    """Rows cut in blocks, the last filled with zeros: `[N, W] -> [N, B, 64]`."""
    blocks = blocks_of(values.shape[1])
    whole = F.pad(values, (0, blocks * BLOCK - values.shape[1]))
    return whole.view(len(values), blocks, BLOCK)
