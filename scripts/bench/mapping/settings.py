"""Which models are trained, how, and how often. Nothing here imports torch."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, replace
from typing import Literal

Start = Literal["cut", "random", "pretrained"]

BLOCKS = {"ends": "ends", "uniform": "uniform", "first": "first", "last": "last"}
"""Choices of the teacher blocks that a student starts from; `last` are the last ones."""


@dataclass(frozen=True)
class Shape:
    """A small model.

    Attributes:
        architecture: As transformers calls it.
        depth: Blocks.
        width: Features.
        heads: Of attention.
    """

    architecture: str
    depth: int
    width: int
    heads: int

    def __str__(self) -> str:
        """For tables."""
        return f"{self.architecture} {self.depth} x {self.width}"


@dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Attributes:
        title: In the report.
        teacher: Trained on the spot.
        student: Trained under every map.
        start: The student's weights: cut from the teacher, random, or a short training of its own.
        masked: Masked language models, not causal ones.
        teacher_steps: Of the teacher's training.
        teacher_rate: Its peak learning rate.
        rate: The student's peak learning rate, the same under all maps.
        length: Of the student's training, in trainings of the usual length.
    """

    title: str
    teacher: Shape
    student: Shape
    start: Start
    masked: bool = False
    teacher_steps: int = 1200
    teacher_rate: float = 3e-3
    rate: float = 2e-3
    length: int = 1


PAIRS = {
    "a": Pair(
        "same family, cut in depth",
        Shape("llama", 12, 64, 4),
        Shape("llama", 4, 64, 4),
        "cut",
    ),
    "b": Pair(
        "same family, narrower and shallower, random weights",
        Shape("llama", 8, 96, 4),
        Shape("llama", 3, 48, 4),
        "random",
    ),
    "c": Pair(
        "another family, same tokens, pretrained student",
        Shape("gpt2", 8, 64, 4),
        Shape("llama", 4, 48, 4),
        "pretrained",
        teacher_steps=1600,
    ),
    "d": Pair(
        "masked language models, narrower and shallower, random weights",
        Shape("roformer", 8, 64, 4),
        Shape("roformer", 4, 48, 4),
        "random",
        masked=True,
        teacher_rate=1e-3,
        length=2,
    ),
}
"""The four of the issue, at sizes that a CPU trains in seconds.

RoFormer is BERT with rotary positions. With learned ones the masked loss of an 8 x 64 BERT stays at
the entropy of single bytes (3.1 nats after 2,500 steps), so that it has nothing to teach. Its
student has twice the steps: after 200 some seeds have left that plateau and others have not.
"""


@dataclass(frozen=True)
class Settings:
    """How a benchmark trains.

    Attributes:
        pairs: By their letters.
        text: CRC of the text, so that other text has other results.
        steps: Of one training of a student, of the usual length.
        batch: Sequences.
        length: Bytes of a sequence.
        held_out: Sequences of the held-out text.
        pretraining: Steps of students that start from a training of their own.
        weights: Of the hint; every map is used with its best one.
        wider: Tried one after the other, by maps whose best weight so far is the largest.
        tuning: Seeds that the best weight is chosen on.
        few: Seeds of every arm.
        many: Seeds of the arms that the verdict rests on.
        maps: Random maps whose score is compared with what they come to.
        share: Of the steps, that a race may take: a race of a short training needs most of it.
        blockwise: Share of the training in which blocks learn alone, where they do.
        init: Of the projectors, where widths differ.
    """

    pairs: tuple[tuple[str, Pair], ...] = tuple(PAIRS.items())
    text: int = 0
    steps: int = 200
    batch: int = 8
    length: int = 64
    held_out: int = 96
    pretraining: int = 200
    weights: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    wider: tuple[float, ...] = (30.0, 100.0)
    tuning: int = 2
    few: int = 3
    many: int = 8
    maps: int = 20
    share: float = 0.99
    blockwise: float = 1 / 3
    init: Literal["random", "least_squares"] = "least_squares"

    def pair(self, name: str) -> Pair:
        """By its letter."""
        return dict(self.pairs)[name]

    def steps_of(self, name: str) -> int:
        """Of a pair's trainings."""
        return self.steps * self.pair(name).length

    def digest(self, name: str) -> str:
        """Of everything that the lines of a pair depend on, for the name of their folder."""
        told = asdict(self) | {"pairs": [name, asdict(self.pair(name))]}
        del told["wider"]  # more lines, and no other ones
        return f"{zlib.crc32(json.dumps(told).encode()):08x}"

    def quick(self) -> Settings:
        """Next to nothing of the same, for tests."""
        pairs = tuple((name, _tiny(pair)) for name, pair in self.pairs)
        tiny = replace(self, pairs=pairs, steps=4, batch=2, length=16, held_out=4, pretraining=2)
        return replace(tiny, weights=(1.0, 3.0), wider=(), tuning=1, few=2, many=2, maps=4)


def _tiny(pair: Pair) -> Pair:
    """The same pair of models that learn nothing."""
    teacher = replace(pair.teacher, depth=4, width=16, heads=2)
    narrow = pair.student.width < pair.teacher.width
    student = replace(pair.student, depth=2, width=8 if narrow else 16, heads=2)
    return replace(pair, teacher=teacher, student=student, teacher_steps=3)
