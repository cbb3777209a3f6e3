"""Layer maps by the two depths alone.

A strategy is a function of the student's and the teacher's depth; settings are keywords.
"""

import random as stdlib_random
from collections.abc import Sequence
from dataclasses import replace

from llm_distill.layers.map import LayerMap


def uniform(student_depth: int, teacher_depth: int) -> LayerMap:
    """Every student block, spread evenly over the teacher; last on last.

    Student block i takes the end of the i-th of `student_depth` equal segments of the teacher
    (halves round up).

    Source: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, section 3.1; here for depths that do not
    divide as well.

    >>> uniform(4, 10).pairs
    ((1, 3), (2, 5), (3, 8), (4, 10))
    """
    pairs = enumerate(even_ends(student_depth, teacher_depth), start=1)
    return LayerMap.of(pairs, student_depth, teacher_depth, "uniform")


def even_ends(segments: int, length: int) -> list[int]:
    """The ends of equal segments of 1..length, halves rounded up, at least 1.

    >>> even_ends(4, 10)
    [3, 5, 8, 10]
    """
    ends = [(2 * i * length + segments) // (2 * segments) for i in range(1, segments + 1)]
    return [max(end, 1) for end in ends]


def last(student_depth: int, teacher_depth: int, *, n: int = 1) -> LayerMap:
    """The last n blocks of the student from the last n of the teacher.

    Raises:
        ValueError: If n is < 1 or larger than a depth.

    Source: Sun et al. 2019 (PKD-Last), arXiv 1908.09355, section 3.2; with n = 1 Wang et al. 2020,
    arXiv 2002.10957.

    >>> last(4, 10, n=2).pairs
    ((3, 9), (4, 10))
    """
    _check_count("last", n, student_depth, teacher_depth)
    pairs = [(student_depth - k, teacher_depth - k) for k in range(n)]
    return LayerMap.of(pairs, student_depth, teacher_depth, f"last {n}")


def first(student_depth: int, teacher_depth: int, *, n: int | None = None) -> LayerMap:
    """The first n blocks of the student from the first n of the teacher.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        n: How many; None: as many as both have.

    Raises:
        ValueError: If n is < 1 or larger than a depth.

    Source: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351 (its bottom strategy, 4 points below
    uniform on GLUE).

    >>> first(3, 10).pairs
    ((1, 1), (2, 2), (3, 3))
    """
    n = min(student_depth, teacher_depth) if n is None else n
    _check_count("first", n, student_depth, teacher_depth)
    pairs = [(k, k) for k in range(1, n + 1)]
    return LayerMap.of(pairs, student_depth, teacher_depth, f"first {n}")


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
    pairs = [(i, i * stride) for i in range(1, student_depth) if i * stride <= teacher_depth]
    return LayerMap.of(pairs, student_depth, teacher_depth, f"skip, stride {stride}")


def reverse(student_depth: int, teacher_depth: int) -> LayerMap:
    """The blocks of `uniform` in falling order: a control, no proposal.

    Source: Yu, Wen, Mou 2025, arXiv 2502.04499.

    >>> reverse(4, 10).pairs
    ((1, 10), (2, 8), (3, 5), (4, 3))
    """
    pairs = enumerate(reversed(even_ends(student_depth, teacher_depth)), start=1)
    return LayerMap.of(pairs, student_depth, teacher_depth, "reverse")


def random(student_depth: int, teacher_depth: int, *, seed: int = 0, epoch: int = 0) -> LayerMap:
    """Random teacher blocks in rising order, drawn anew in each epoch.

    No block is drawn twice, unless the student is deeper than its teacher.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        seed: The same seed, epoch and depths give the same map on every machine.
        epoch: Set by the training; written down here, the first draw stays.

    Source: Haidar et al. 2021 (RAIL-KD), arXiv 2109.10164.

    >>> random(4, 12, epoch=1).pairs
    ((1, 5), (2, 7), (3, 8), (4, 12))
    >>> random(4, 12, epoch=2).pairs
    ((1, 1), (2, 2), (3, 10), (4, 11))
    """
    draw = stdlib_random.Random(f"{seed} {epoch} {student_depth} {teacher_depth}")
    blocks = range(1, teacher_depth + 1)
    deeper = student_depth > teacher_depth
    chosen = draw.choices(blocks, k=student_depth) if deeper else draw.sample(blocks, student_depth)
    origin = f"random, seed {seed}, epoch {epoch}"
    return LayerMap.of(enumerate(sorted(chosen), start=1), student_depth, teacher_depth, origin)


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
    return LayerMap.of([(s, t) for s, t in pairs], student_depth, teacher_depth, "explicit")


def saved(student_depth: int, teacher_depth: int, *, path: str) -> LayerMap:
    """The map in a YAML file, such as `llm-distill map` and `LayerMap.save` write.

    Figures in it are left out: they were of the map as it was written.

    Raises:
        InputError: If there is no such file, or an entry cannot be.
        ValueError: If it is for other depths.
    """
    found = LayerMap.load(path)(student_depth, teacher_depth)
    return replace(found, origin=f"saved in {path}, from {found.origin}", evidence=())


def _check_count(name: str, n: int, student_depth: int, teacher_depth: int) -> None:
    """Refuse more blocks than there are."""
    most = min(student_depth, teacher_depth)
    if not 1 <= n <= most:
        raise ValueError(
            f"layers: {name} asks for n={n} blocks; depths {student_depth} and {teacher_depth} "
            f"allow 1..{most}"
        )
