"""Sequences of bytes from plain text, training and held out."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts._quickstart.corpus import read_corpus

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.mapping.settings import Settings

VOCABULARY = 257
MASK = 256
"""The token after the 256 bytes."""

HIDDEN = 0.25
"""Share of the bytes of a sequence that a masked language model has to find."""

OTHERS = 10
"""One part in so many of a text is held out, at its end."""

CALIBRATION = 1
"""Of the random numbers that order the passages."""

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Texts:
    """Bytes.

    Attributes:
        train: To train on.
        held_out: Of other documents, or of the end of one.
    """

    train: bytes
    held_out: bytes

    @classmethod
    def read(cls, path: Path | None) -> Texts:
        """A file, its end held out; without one what Python says about itself."""
        if path is None:
            corpus = read_corpus()
            return cls(corpus.train.encode(), corpus.held_out.encode())
        content = path.read_bytes()
        cut = len(content) - len(content) // OTHERS
        return cls(content[:cut], content[cut:])

    @property
    def digest(self) -> int:
        """CRC of both."""
        return zlib.crc32(self.held_out, zlib.crc32(self.train))

    def training(self, settings: Settings, *, masked: bool) -> list[Example]:
        """All passages of the training text, in an order that is always the same."""
        starts = list(range(0, len(self.train) - settings.length + 1, settings.length))
        random.Random(CALIBRATION).shuffle(starts)
        return [example(self.train, at, settings.length, masked=masked) for at in starts]

    def held(self, settings: Settings, *, masked: bool) -> list[Example]:
        """Passages of the held-out text, evenly spread."""
        last, count = len(self.held_out) - settings.length, settings.held_out
        starts = [last * place // max(count - 1, 1) for place in range(count)]
        return [example(self.held_out, at, settings.length, masked=masked) for at in starts]


def example(text: bytes, start: int, length: int, *, masked: bool) -> Example:
    """One passage; which bytes are masked depends on the passage alone, not on who trains."""
    ids = list(text[start : start + length])
    if not masked:
        return {"input_ids": ids, "labels": ids}
    hidden = set(
        random.Random(f"{start} {ids}").sample(range(length), max(1, int(HIDDEN * length)))
    )
    return {
        "input_ids": [MASK if place in hidden else token for place, token in enumerate(ids)],
        "labels": [token if place in hidden else -100 for place, token in enumerate(ids)],
    }


def collate(examples: list[Any]) -> dict[str, Any]:
    """Equal lengths, so nothing is padded."""
    import torch

    return {key: torch.tensor([e[key] for e in examples]) for key in ("input_ids", "labels")}
