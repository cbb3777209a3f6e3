"""Layer maps drawn on how similar the layers are, for people; nothing of a training needs it."""

from __future__ import annotations

import math
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llm_distill.layers import LayerMap, Similarity

COLOURS = "viridis"
"""Rises evenly in lightness: readable for colour-blind people, and in print without colour."""

CELL, SMALLEST, LARGEST = 0.42, 4.5, 9.0
"""Inches of a cell, and of a side of a panel at least and at most."""

MOST_NUMBERED = 17
"""Columns up to which every cell has its figure in it."""

MOST_TICKS = 16
"""Layer numbers on an axis."""

DPI = 150


def heat_map(
    mapping: LayerMap, similarity: Similarity, cross: Similarity | None = None, *, title: str = ""
) -> Figure:
    """The map on the similarity of teacher with teacher layers, and of student with teacher layers.

    Among teacher layers `S2` marks the target of student layer 2; where the map cuts the teacher
    into runs, each run has a frame. Student with teacher layers have a circle for each entry of the
    map, its area the share.

    Args:
        mapping: Which layers.
        similarity: Of teacher layers, `[Lt + 1, Lt + 1]`.
        cross: Of student with teacher layers, `[Ls + 1, Lt + 1]`; None where it was not measured.
        title: Above the origin of the map.

    Raises:
        ValueError: If a similarity is of other depths.
    """
    from matplotlib.figure import Figure

    across, up = mapping.teacher_depth + 1, mapping.student_depth + 1
    _check(similarity, (across, across), "similarity")
    side = min(max(CELL * across, SMALLEST), LARGEST)
    below = 0.0 if cross is None else side * up / across
    beside = below > side / 2  # two large panels stand side by side
    size = (side + 1.4, side + below + (1.1 if cross is None else 2.0))
    if beside:
        size = (2 * (side + 1.4), max(side, below) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [side, below] if cross is not None else [side]
    grid = (
        figure.add_gridspec(1, 2)
        if beside
        else figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
    )
    _draw_teacher(figure.add_subplot(grid[0]), mapping, similarity)
    if cross is not None:
        _check(cross, (up, across), "cross")
        _draw_cross(figure.add_subplot(grid[1]), mapping, cross)
    told = [title, *textwrap.wrap(mapping.origin, round(size[0] * 9))]
    figure.suptitle("\n".join(filter(None, told)), fontsize=10, parse_math=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; needs no display."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")


def segments(mapping: LayerMap) -> list[tuple[int, int]]:
    """First and last teacher block of each run that a student layer finishes; none for other maps.

    >>> from llm_distill.layers import LayerMap, reverse
    >>> segments(LayerMap.of([(1, 3), (2, 4), (3, 6)], 3, 6, "x")), segments(reverse(2, 4))
    ([(1, 3), (4, 4), (5, 6)], [])
    """
    pairs = mapping.pairs
    single = len(pairs) == len(mapping.rows)
    rises = all(a < c and b < d for (a, b), (c, d) in pairwise(pairs))
    if not (single and rises) or pairs[0][1] == 0:
        return []
    ends = [0, *(layer for _, layer in pairs)]
    return [(before + 1, end) for before, end in pairwise(ends)]


def _check(similarity: Similarity, shape: tuple[int, int], name: str) -> None:
    """Refuse a matrix of other layers."""
    found = tuple(similarity.values.shape)
    if found != shape:
        raise ValueError(
            f"heat map: {name} has shape {list(found)}; this map needs {list(shape)}, the "
            "embedding included"
        )


def _draw_teacher(axes: Axes, mapping: LayerMap, similarity: Similarity) -> None:
    """Teacher with teacher layers, runs and targets."""
    from matplotlib.patches import Rectangle

    targets = _targets(mapping)
    _draw_matrix(axes, similarity, {(t, t): name for t, name in targets.items()}, numbered=True)
    for first, last in segments(mapping) or [(t, t) for t in targets]:
        side = last - first + 1
        frame = Rectangle((first - 0.5, first - 0.5), side, side, fill=False, linewidth=1.6)
        frame.set(edgecolor="white", path_effects=_outlined(3.2), gid=f"{first}-{last}")
        axes.add_patch(frame)
    axes.set(xlabel="teacher layer (0: embedding)", ylabel="teacher layer")
    axes.set_title(f"teacher with teacher {_error(similarity)}", fontsize=9)


def _draw_cross(axes: Axes, mapping: LayerMap, cross: Similarity) -> None:
    """Student with teacher layers, and the entries of the map."""
    mixed = len(mapping.pairs) > len(mapping.rows)
    _draw_matrix(axes, cross, {}, numbered=not mixed)  # small circles would hide the figures
    entries = [(row.student, t, share) for row in mapping.rows for t, share in row.teacher]
    across = cross.values.shape[1]
    points = 72 * min(max(CELL * across, SMALLEST), LARGEST) / across
    circles = axes.scatter(
        [t for _, t, _ in entries],
        [s for s, _, _ in entries],
        s=[share * (0.8 * points) ** 2 for *_, share in entries],
        facecolors="none",
        edgecolors="white",
        linewidths=1.6,
    )
    circles.set(path_effects=_outlined(3.2), gid="map")
    axes.set(xlabel="teacher layer (0: embedding)", ylabel="student layer")
    axes.set_title(f"student with teacher {_error(cross)}", fontsize=9)


def _draw_matrix(
    axes: Axes, similarity: Similarity, marks: dict[tuple[int, int], str], *, numbered: bool
) -> None:
    """Cells with a colour bar; a mark, or in small matrices the figure, in them."""
    values = similarity.values.double().cpu().numpy()
    low, high = _range(values[1:, 1:])
    image = axes.imshow(
        values, cmap=COLOURS, vmin=low, vmax=high, origin="lower", interpolation="nearest"
    )
    up, across = values.shape
    strip = axes.inset_axes((1.02, 0.0, 0.04, 1.0))
    beyond = bool(values.min() < low), bool(values.max() > high)
    extend = (
        ("both" if all(beyond) else "min" if beyond[0] else "max") if any(beyond) else "neither"
    )
    axes.figure.colorbar(image, cax=strip, extend=extend).set_label("unbiased CKA")
    axes.set_xticks(range(0, across, math.ceil(across / MOST_TICKS)))
    axes.set_yticks(range(0, up, math.ceil(up / MOST_TICKS)))
    small = across <= MOST_NUMBERED
    texts = {(y, x): _short(values[y, x]) for y in range(up) for x in range(across)}
    for (y, x), text in ((texts if numbered and small else {}) | marks).items():
        weight = "bold" if (y, x) in marks else "normal"
        colour, size = _on(image.to_rgba(values[y, x])), 7 if small else 5
        place = {"ha": "center", "va": "center", "fontsize": size, "color": colour}
        axes.text(x, y, text, fontdict=place, fontweight=weight)


def _targets(mapping: LayerMap) -> dict[int, str]:
    """Teacher layers and who learns from them; of a mixture the largest share counts.

    >>> from llm_distill.layers import LayerMap
    >>> _targets(LayerMap.of([(1, 3), (2, 3), (3, 6)], 3, 6, "x"))
    {3: 'S1,2', 6: 'S3'}
    """
    found: dict[int, list[int]] = {}
    for row in mapping.rows:
        main = max(row.teacher, key=_share)[0]
        found.setdefault(main, []).append(row.student)
    names = {t: list(dict.fromkeys(students)) for t, students in found.items()}
    return {
        t: f"S{','.join(map(str, s))}" if len(s) < 3 else f"S{s[0]}…{s[-1]}"
        for t, s in names.items()
    }


def _share(entry: tuple[int, float]) -> float:
    """To compare by."""
    return entry[1]


def _range(values: Any) -> tuple[float, float]:  # noqa: ANN401  an array
    """Round ends of the colours for the blocks; the embedding, which is far off, may lie beyond."""
    ends = [round(float(end) * 20, 3) for end in (values.min(), values.max())]
    low, high = math.floor(ends[0]) / 20, math.ceil(ends[1]) / 20
    return (low, high) if low < high else (low - 0.05, high)


def _short(value: float) -> str:
    """Two digits: `.97`, `1`, `-.02`.

    >>> [_short(v) for v in (0.973, 1.0, -0.02, 0.001, -0.001)]
    ['.97', '1', '-.02', '0', '0']
    """
    text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")
    return {"1.00": "1", ".00": "0", "-.00": "0"}.get(text, text)


def _on(colour: Any) -> str:  # noqa: ANN401  red, green, blue, alpha
    """Black or white, whichever is readable on a colour."""
    red, green, blue = (float(c) for c in colour[:3])
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _outlined(width: float) -> list[Any]:
    """A dark line below a light one: seen on every colour."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=width, foreground="black"), Normal()]


def _error(similarity: Similarity) -> str:
    """The largest standard error among blocks."""
    return f"(standard errors up to {float(similarity.errors[1:, 1:].max()):.2g})"
