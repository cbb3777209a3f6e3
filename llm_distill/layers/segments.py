"""Layer maps from the teacher alone: each student layer finishes a run of similar teacher layers.

Similarity to the present student is the wrong target: a student made from teacher layers looks like
the teacher's first layers, and a hint would hold it there. What helps is where it has to get to.
"""

from collections.abc import Sequence
from dataclasses import replace

from llm_distill.layers.evidence import figures, given
from llm_distill.layers.map import LayerMap
from llm_distill.layers.programmes import cut, spaced, spread
from llm_distill.layers.similarity import Similarity
from llm_distill.layers.strategies import uniform


def segmentation(
    student_depth: int, teacher_depth: int, *, similarity: Similarity | None = None
) -> LayerMap:
    """Cuts the teacher into one run of similar blocks per student block, which learns its end.

    Maximises the sum over the teacher's blocks j of C[j, end of j's segment], exactly; the last
    segment ends at the last block, the embedding belongs to none, and ties go to the map closest to
    `uniform`. With a student deeper than its teacher every teacher block is a segment, spread
    evenly over the student.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        similarity: C, of teacher layers with teacher layers; measured at calibration.

    Raises:
        ValueError: If there is no similarity, or it has another depth.

    Source: ours; the exact programme is that of Bellman 1961 (segmentation of a curve).

    >>> import torch
    >>> halves = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(4, 4))
    >>> segmentation(2, 6, similarity=Similarity(halves, halves)).pairs
    ((1, 2), (2, 6))
    """
    similarity = given(similarity, "segmentation", "similarity")
    gain = _finished(figures(similarity, teacher_depth, teacher_depth, "similarity"))
    return _cut(student_depth, teacher_depth, gain, "segmentation", "the end of the segment")


def coverage(
    student_depth: int,
    teacher_depth: int,
    *,
    similarity: Similarity | None = None,
) -> LayerMap:
    """Targets that stand for the whole teacher: every block is close to one of them.

    Maximises the sum over the teacher's blocks j of the larger of C[j, target before j] and
    C[j, target at or after j], exactly; the last target is the last block, the embedding is none,
    and ties go to the map closest to `uniform`. Unlike a segment, which is measured against its end
    alone, a block may be close to where the run before it ended: no student block is asked to do
    the work of many teacher blocks only because they resemble each other. With a student deeper
    than its teacher every teacher block is a target, spread evenly over the student.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        similarity: C, of teacher layers with teacher layers; measured at calibration.

    Raises:
        ValueError: If there is no similarity, or it has another depth.

    Source: ours; the criterion is that of k-medoids (Kaufman and Rousseeuw 1987), here with a fixed
    last medoid and along a line, where dynamic programming is exact.

    >>> import torch
    >>> drift = torch.tensor([[1 - abs(i - j) / 10 for j in range(8)] for i in range(8)])
    >>> coverage(2, 7, similarity=Similarity(drift, drift)).pairs  # all within 2 of 3 or 7
    ((1, 3), (2, 7))
    """
    similarity = given(similarity, "coverage", "similarity")
    gain = _covered(figures(similarity, teacher_depth, teacher_depth, "similarity"))
    return _cut(student_depth, teacher_depth, gain, "coverage", "the nearer target")


def arc_length(
    student_depth: int, teacher_depth: int, *, similarity: Similarity | None = None
) -> LayerMap:
    """Spread evenly over how much the teacher's states change, rather than over its blocks.

    Block t lies at the sum of 1 - C between neighbours up to it. The step from the embedding to
    block 1, which is no change of the same kind, counts as the mean of the others, so that equal
    changes give `uniform`. Rising strictly, last on last, at the least total distance.

    Raises:
        ValueError: If there is no similarity, or it has another depth.

    Source: ours.

    >>> import torch
    >>> same = torch.full((7, 7), 0.9)
    >>> arc_length(2, 6, similarity=Similarity(same, same)).pairs
    ((1, 3), (2, 6))
    """
    similarity = given(similarity, "arc_length", "similarity")
    values = figures(similarity, teacher_depth, teacher_depth, "similarity")
    if student_depth > teacher_depth:
        origin = "arc_length, student deeper: one row per teacher block"
        pairs = spread(student_depth, teacher_depth)
        return LayerMap.of(pairs, student_depth, teacher_depth, origin)
    chosen = spaced(_arc(values)[1:], student_depth)
    pairs = [(s, t + 1) for s, t in enumerate(chosen, start=1)]
    return LayerMap.of(pairs, student_depth, teacher_depth, "arc_length")


def auto(
    student_depth: int,
    teacher_depth: int,
    *,
    similarity: Similarity | None = None,
    most: int = 8,
) -> LayerMap:
    """`coverage`, of which at most so many rows, evenly by the teacher's arc length, stay.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        similarity: Of teacher layers with teacher layers; measured at calibration.
        most: Rows; the last one is always among them.

    Raises:
        ValueError: If there is no similarity, it has another depth, or `most` is < 1.

    >>> import torch
    >>> same = torch.full((13, 13), 0.9)
    >>> auto(6, 12, similarity=Similarity(same, same), most=3).pairs
    ((2, 4), (4, 8), (6, 12))
    """
    if most < 1:
        raise ValueError(f"layers: auto asks for at most {most} rows; write a number >= 1")
    similarity = given(similarity, "auto", "similarity")
    whole = coverage(student_depth, teacher_depth, similarity=similarity)
    found = replace(whole, origin=f"auto: {whole.origin}")
    if len(whole.rows) <= most:
        return found
    arc = _arc(figures(similarity, teacher_depth, teacher_depth, "similarity"))
    chosen = spaced([arc[t] for _, t in whole.pairs], most)
    origin = f"{found.origin}, {most} of {len(whole.rows)} rows by teacher arc length"
    return replace(found, rows=tuple(whole.rows[k] for k in chosen), origin=origin)


def score(layer_map: LayerMap, similarity: Similarity) -> float:
    """Mean similarity of the teacher's blocks to the end of their segment: what `segmentation` has.

    A segment runs from the block after the target before it to the target of a row; blocks after
    the last target count 0.

    Raises:
        ValueError: If a row has several teacher layers, or the targets fall.

    >>> import torch
    >>> halves = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(4, 4))
    >>> score(uniform(2, 6), Similarity(halves, halves))  # blocks 1 and 2 are cut off from their 3
    0.6666666666666666
    """
    depth = layer_map.teacher_depth
    return _mean(_ends(layer_map), _finished(figures(similarity, depth, depth, "similarity")))


def covered(layer_map: LayerMap, similarity: Similarity) -> float:
    """Mean similarity of the teacher's blocks to the nearer target around them, as in `coverage`.

    Blocks after the last target count 0.

    Raises:
        ValueError: If a row has several teacher layers, or the targets fall.

    >>> import torch
    >>> halves = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(4, 4))
    >>> covered(uniform(2, 6), Similarity(halves, halves))  # 3 is one of 3 to 6 and stands for them
    0.6666666666666666
    """
    depth = layer_map.teacher_depth
    return _mean(_ends(layer_map), _covered(figures(similarity, depth, depth, "similarity")))


def _cut(
    student_depth: int, teacher_depth: int, gain: Sequence[Sequence[float]], name: str, to: str
) -> LayerMap:
    """The map of the stretches with the largest sum of gains.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        gain: Of each stretch, `[Lt + 1][Lt + 1]`.
        name: Of the strategy.
        to: What a gain measures similarity to, in the words of the evidence.
    """
    origin, even = name, uniform(student_depth, teacher_depth)
    if student_depth > teacher_depth:
        pairs = spread(student_depth, teacher_depth)
        origin += ", student deeper: one row per teacher block"
    else:
        pairs = list(enumerate(cut(gain, student_depth), start=1))
    evidence = (
        (f"mean similarity to {to}", _mean([t for _, t in pairs], gain)),
        ("the same for uniform", _mean([t for _, t in even.pairs], gain)),
    )
    return LayerMap.of(pairs, student_depth, teacher_depth, origin, evidence)


def _finished(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """What the blocks after b and up to e have in common with block e: `[Lt + 1][Lt + 1]`."""
    depth = len(values) - 1
    gain = [[0.0] * (depth + 1) for _ in range(depth + 1)]
    for e in range(1, depth + 1):
        for b in reversed(range(e)):
            gain[b][e] = gain[b + 1][e] + values[b + 1][e]
    return gain


def _covered(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """The same, where a block may be closer to b, unless that is the embedding."""
    gain = _finished(values)
    for b in range(1, len(values)):
        for e in range(b + 1, len(values)):
            gain[b][e] = sum(max(values[j][b], values[j][e]) for j in range(b + 1, e + 1))
    return gain


def _mean(ends: Sequence[int], gain: Sequence[Sequence[float]]) -> float:
    """The gain of stretches, per block."""
    stretches = zip([0, *ends], ends, strict=False)
    return sum(gain[b][e] for b, e in stretches) / (len(gain) - 1)


def _ends(layer_map: LayerMap) -> list[int]:
    """The targets of the rows."""
    ends = [t for _, t in layer_map.pairs]
    if len(ends) > len(layer_map.rows) or ends != sorted(ends):
        raise ValueError(
            f"layers: {layer_map.origin} has no segments: a score needs one teacher layer per row, "
            "rising with the student's"
        )
    return ends


def _arc(values: Sequence[Sequence[float]]) -> list[float]:
    """Way from the embedding to each layer: `[Lt + 1][Lt + 1]` -> Lt + 1."""
    depth = len(values) - 1
    steps = [max(1 - values[t][t + 1], 0.0) for t in range(1, depth)]
    way = [0.0, sum(steps) / len(steps) if steps else 1.0]
    for step in steps:
        way.append(way[-1] + step)
    return way
