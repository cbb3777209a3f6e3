"""Exact dynamic programmes over layers, whose ties go to what is spread evenly."""

from collections.abc import Sequence

from llm_distill.layers.strategies import even_ends

TIE = 1e-6
"""What one block of distance from the uniform map costs, in similarity. Added to the score before
it is maximised, so that maps whose scores differ by less are ties that the more uniform one wins:
above the rounding of fp32 (1e-7), far below any standard error of a measured similarity (1e-3). A
tolerance on comparisons inside the programme would not be transitive."""


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


def cut(gain: Sequence[Sequence[float]], count: int) -> list[int]:
    """Ends of `count` stretches of 1..n with the largest sum of gains, the last one n.

    Exact dynamic programme in `count` n^2 steps. Needs count <= n.

    Args:
        gain: `[n + 1][n + 1]`; of the stretch after b up to e (b < e), 0 where the first begins.
        count: How many.

    >>> cut([[0, 1, 9, 0], [0, 0, 2, 3], [0, 0, 0, 4], [0, 0, 0, 0]], 2)
    [2, 3]
    """
    length = len(gain) - 1
    even = even_ends(count, length)
    best = [0.0] + [float("-inf")] * length
    before: list[list[int]] = []
    for k in range(count):
        reached, chosen = [float("-inf")] * (length + 1), [0] * (length + 1)
        for e in range(k + 1, length + 1):
            start = max(range(k, e), key=lambda b: best[b] + gain[b][e])
            reached[e] = best[start] + gain[start][e] - TIE * abs(e - even[k])
            chosen[e] = start
        best = reached
        before.append(chosen)
    ends = [length]
    for chosen in reversed(before[1:]):
        ends.append(chosen[ends[-1]])
    return ends[::-1]
