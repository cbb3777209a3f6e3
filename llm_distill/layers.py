"""Which layer of the student learns from which layer of the teacher.

Layers are numbered as `hidden_states` of transformers: 0 is the embedding, k = 1..depth is the
output of block k (the last one after the final norm), so that one map serves hidden states and the
heads of block k alike. Negative numbers count from the end, -1 is the last block. A strategy is a
function of the two depths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["LayerMap", "explicit", "last", "skip", "uniform"]


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers, and where they came from.

    Attributes:
        pairs: (student layer, teacher layer), ascending; a layer may occur more than once on either
            side.
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        origin: The strategy in words.

    Raises:
        ValueError: If a layer does not exist, a pair stands twice, or there is no pair.

    >>> print(uniform(2, 6))
    student layer | teacher layer   uniform
                1 | 3 of 6
                2 | 6 of 6
    """

    pairs: tuple[tuple[int, int], ...]
    student_depth: int
    teacher_depth: int
    origin: str

    def __post_init__(self) -> None:
        """Resolve negative layers and refuse what does not exist."""
        if not self.pairs:
            raise ValueError(
                f"layers: {self.origin} maps no layer for depths {self.student_depth} and "
                f"{self.teacher_depth}"
            )
        resolved = [
            (_resolve(s, self.student_depth, "student"), _resolve(t, self.teacher_depth, "teacher"))
            for s, t in self.pairs
        ]
        if len(set(resolved)) < len(resolved):
            raise ValueError(
                f"layers: a pair stands twice in {resolved}; write each pair once and use `weight`"
            )
        object.__setattr__(self, "pairs", tuple(sorted(resolved)))

    @property
    def student_layers(self) -> frozenset[int]:
        """The student's layers that take part."""
        return frozenset(s for s, _ in self.pairs)

    @property
    def teacher_layers(self) -> frozenset[int]:
        """The teacher's layers that take part."""
        return frozenset(t for _, t in self.pairs)

    def __str__(self) -> str:
        """A small table."""
        lines = [f"student layer | teacher layer   {self.origin}"]
        lines += [f"{s:>13} | {t} of {self.teacher_depth}" for s, t in self.pairs]
        return "\n".join(lines)


LayerStrategy = Callable[[int, int], LayerMap]
"""(student depth, teacher depth) -> map."""


def uniform(student_depth: int, teacher_depth: int) -> LayerMap:
    """Every student block, spread evenly over the teacher; last on last.

    Student block i takes the end of the i-th of `student_depth` equal segments of the teacher
    (halves round up).

    Source: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, section 3.1; here for depths that do not
    divide as well.

    >>> uniform(4, 10).pairs
    ((1, 3), (2, 5), (3, 8), (4, 10))
    """
    ends = [
        (2 * i * teacher_depth + student_depth) // (2 * student_depth)
        for i in range(1, student_depth + 1)
    ]
    pairs = tuple((i, max(end, 1)) for i, end in enumerate(ends, start=1))
    return LayerMap(pairs, student_depth, teacher_depth, "uniform")


def last(student_depth: int, teacher_depth: int, *, n: int = 1) -> LayerMap:
    """The last n blocks of the student from the last n of the teacher.

    Raises:
        ValueError: If n is < 1 or larger than a depth.

    Source: Sun et al. 2019 (PKD-Last), arXiv 1908.09355, section 3.2; with n = 1 Wang et al. 2020,
    arXiv 2002.10957.

    >>> last(4, 10, n=2).pairs
    ((3, 9), (4, 10))
    """
    most = min(student_depth, teacher_depth)
    if not 1 <= n <= most:
        raise ValueError(
            f"layers: last asks for n={n} blocks; depths {student_depth} and {teacher_depth} allow "
            f"1..{most}"
        )
    pairs = tuple((student_depth - k, teacher_depth - k) for k in range(n))
    return LayerMap(pairs, student_depth, teacher_depth, f"last {n}")


def skip(student_depth: int, teacher_depth: int) -> LayerMap:
    """Every stride-th teacher block from the bottom, the student's last block left to the logits.

    The stride is `teacher_depth // student_depth`, at least 1; blocks the teacher does not have are
    left out.

    Source: Sun et al. 2019 (PKD-Skip), arXiv 1908.09355, section 3.2.

    >>> skip(4, 10).pairs
    ((1, 2), (2, 4), (3, 6))

    Raises:
        ValueError: If the student has one block only: nothing is left to map.
    """
    stride = max(teacher_depth // student_depth, 1)
    pairs = tuple((i, i * stride) for i in range(1, student_depth) if i * stride <= teacher_depth)
    return LayerMap(pairs, student_depth, teacher_depth, f"skip, stride {stride}")


def explicit(student_depth: int, teacher_depth: int, *, pairs: Sequence[Sequence[int]]) -> LayerMap:
    """The pairs as written, `[[student layer, teacher layer], ...]`; many-to-one either way.

    Raises:
        ValueError: For what is no pair of numbers, a layer that does not exist, or a pair twice.

    >>> explicit(4, 10, pairs=[[1, 2], [1, 3], [-1, -1]]).pairs
    ((1, 2), (1, 3), (4, 10))
    """
    wrong = [pair for pair in pairs if len(pair) != 2 or not all(isinstance(k, int) for k in pair)]
    if wrong:
        raise ValueError(
            f"layers: {wrong[0]!r} is not a pair of layer numbers; write "
            "[[student layer, teacher layer], ...]"
        )
    return LayerMap(tuple((s, t) for s, t in pairs), student_depth, teacher_depth, "explicit")


def _resolve(layer: int, depth: int, side: str) -> int:
    """A layer number in 0..depth, negative ones counted from the end."""
    if not -depth <= layer <= depth:
        raise ValueError(
            f"layers: {side} layer {layer} is out of range 0..{depth} (0 is the embedding, {depth} "
            "the last)"
        )
    return layer + depth + 1 if layer < 0 else layer
