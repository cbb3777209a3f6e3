"""Layer maps from the teacher alone: each student layer finishes a run of similar teacher layers.

Similarity to the present student is the wrong target: a student made from teacher layers looks like
the teacher's first layers, and a hint would hold it there. What helps is where it has to get to.
"""

from collections.abc import Sequence
from dataclasses import replace

from llm_distill.layers.evidence import figures, given
from llm_distill.layers.map import LayerMap
from llm_distill.layers.similarity import Similarity
from llm_distill.layers.strategies import even_ends, uniform

TIE = 1e-6
"""What one block of distance from the uniform map costs, in similarity. Added to the score before
it is maximised, so that maps whose scores differ by less are ties that the more uniform one wins:
above the rounding of fp32 (1e-7), far below any standard error of a measured similarity (1e-3). A
tolerance on comparisons inside the programme would not be transitive."""


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
    values = figures(similarity, teacher_depth, teacher_depth, "similarity")
    origin = "segmentation"
    if student_depth > teacher_depth:
        pairs = spread(student_depth, teacher_depth)
        origin += ", student deeper: one row per teacher block"
    else:
        pairs = list(enumerate(_segment_ends(values, student_depth), start=1))
    found = LayerMap.of(pairs, student_depth, teacher_depth, origin)
    even = uniform(student_depth, teacher_depth)
    evidence = (
        ("mean similarity to the end of the segment", score(found, similarity)),
        ("the same for uniform", score(even, similarity)),
    )
    return replace(found, evidence=evidence)


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
    """`segmentation`, of which at most so many rows, evenly by the teacher's arc length, stay.

    Args:
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        similarity: Of teacher layers with teacher layers; measured at calibration.
        most: Rows; the last block is always among them.

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
    whole = segmentation(student_depth, teacher_depth, similarity=similarity)
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
    values = figures(similarity, layer_map.teacher_depth, layer_map.teacher_depth, "similarity")
    ends = [t for _, t in layer_map.pairs]
    if len(ends) > len(layer_map.rows) or ends != sorted(ends):
        raise ValueError(
            f"layers: {layer_map.origin} has no segments: a score needs one teacher layer per row, "
            "rising with the student's"
        )
    total = 0.0
    for start, end in zip([0, *ends], ends, strict=False):
        total += sum(values[j][end] for j in range(start + 1, end + 1))
    return total / layer_map.teacher_depth


def spread(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Every teacher block once, spread evenly over a deeper student; last on last.

    >>> spread(5, 3)
    [(2, 1), (3, 2), (5, 3)]
    """
    return [(s, t) for t, s in enumerate(even_ends(teacher_depth, student_depth), start=1)]


def spaced(positions: Sequence[float], count: int) -> list[int]:
    """Indices of `count` positions that divide the way to the last one most evenly.

    Rising strictly, the last one included, at the least sum of distances; ties go to indices that
    are spread evenly.

    >>> spaced([0.1, 0.5, 0.55, 1.0], 2)
    [1, 3]
    """
    n = len(positions)
    stretch = n / positions[-1] if positions[-1] > 0 else 0.0
    even = even_ends(count, n)
    gain = [
        [
            -abs(position * stretch - k * n / count * bool(stretch)) - TIE * abs(i - even[k - 1])
            for i, position in enumerate(positions, start=1)
        ]
        for k in range(1, count + 1)
    ]
    return [end - 1 for end in rising(gain)]


def rising(gain: Sequence[Sequence[float]], *, anchored: bool = True) -> list[int]:
    """The strictly rising columns, one in each row, of the largest sum: `[R][C]` -> R of 1..C.

    Exact dynamic programme in R C steps. Needs R <= C.

    Args:
        gain: By row and column.
        anchored: Whether the last row takes the last column.

    >>> rising([[5.0, 0.0, 0.0], [9.0, 1.0, 2.0]]), rising([[0.0, 1.0], [5.0, 0.0]])
    ([1, 3], [1, 2])
    """
    columns = len(gain[0])
    best = list(gain[0])
    before: list[list[int]] = []
    for row in gain[1:]:
        reached, leading, chosen = [], -1, []
        for c in range(columns):
            if c and (leading < 0 or best[c - 1] > best[leading]):
                leading = c - 1
            chosen.append(leading)
            reached.append(row[c] + best[leading] if leading >= 0 else float("-inf"))
        best = reached
        before.append(chosen)
    end = columns - 1 if anchored else max(range(columns), key=best.__getitem__)
    path = [end]
    for chosen in reversed(before):
        path.append(chosen[path[-1]])
    return [c + 1 for c in reversed(path)]


def _segment_ends(values: Sequence[Sequence[float]], segments: int) -> list[int]:
    """Where each segment ends: `[Lt + 1][Lt + 1]` -> as many of 1..Lt, the last one Lt."""
    depth = len(values) - 1
    even = even_ends(segments, depth)
    # inside[e][b]: what blocks 1..b have in common with block e.
    inside = [[0.0] * (depth + 1) for _ in range(depth + 1)]
    for e in range(1, depth + 1):
        for j in range(1, e + 1):
            inside[e][j] = inside[e][j - 1] + values[j][e]
    best = [0.0] + [float("-inf")] * depth
    before: list[list[int]] = []
    for k in range(segments):
        reached, chosen = [float("-inf")] * (depth + 1), [0] * (depth + 1)
        for e in range(k + 1, depth + 1):
            start = max(range(k, e), key=lambda b: best[b] - inside[e][b])
            reached[e] = best[start] + inside[e][e] - inside[e][start] - TIE * abs(e - even[k])
            chosen[e] = start
        best = reached
        before.append(chosen)
    ends = [depth]
    for chosen in reversed(before[1:]):
        ends.append(chosen[ends[-1]])
    return ends[::-1]


def _arc(values: Sequence[Sequence[float]]) -> list[float]:
    """Way from the embedding to each layer: `[Lt + 1][Lt + 1]` -> Lt + 1."""
    depth = len(values) - 1
    steps = [max(1 - values[t][t + 1], 0.0) for t in range(1, depth)]
    way = [0.0, sum(steps) / len(steps) if steps else 1.0]
    for step in steps:
        way.append(way[-1] + step)
    return way
