"""Heat maps by what they show: colours, frames, circles, words."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_distill.layers import LayerMap, Row, Similarity, last, reverse, uniform
from llm_distill.plots import _range, heat_map, save, segments


def similarity(rows: int, columns: int, *, low: float = 0.6, error: float = 0.004) -> Similarity:
    """Falls with the distance from the diagonal, from 1 to `low`."""
    across = torch.arange(columns + 1)[None] / columns
    distance = (torch.arange(rows + 1)[:, None] / rows - across).abs()
    return Similarity(1 - (1 - low) * distance, torch.full(distance.shape, error))


def panels(figure: Figure) -> list[Axes]:
    """The matrices, colour bars left out."""
    return [axes for axes in figure.axes if axes.images]


def shown(axes: Axes) -> np.ndarray[Any, Any]:
    """What the colours stand for."""
    return cast("np.ndarray[Any, Any]", np.asarray(axes.images[0].get_array()))


def frames(axes: Axes) -> list[tuple[float, float, float]]:
    """Left, lower corner and side of each frame."""
    found: list[Any] = [patch for patch in axes.patches if patch.get_gid()]
    assert all(p.get_width() == p.get_height() for p in found)
    return [(p.get_x(), p.get_y(), p.get_width()) for p in found]


def words(axes: Axes) -> dict[tuple[float, float], str]:
    """Text in the cells: (teacher layer, row) -> what stands there."""
    return {text.get_position(): text.get_text() for text in axes.texts}


def circles(axes: Axes) -> dict[tuple[float, float], float]:
    """(teacher layer, student layer) -> area."""
    (found,) = [c for c in axes.collections if c.get_gid() == "map"]
    places = np.asarray(found.get_offsets()).tolist()
    areas = cast("Any", found).get_sizes().tolist()
    return {(x, y): area for (x, y), area in zip(places, areas, strict=True)}


class TestTeacher:
    def test_it_shows_the_similarities_in_order(self) -> None:
        teacher = similarity(12, 12)
        (axes,) = panels(heat_map(uniform(4, 12), teacher, title="HiddenStates"))
        np.testing.assert_allclose(shown(axes), teacher.values.numpy(), atol=1e-7)
        assert axes.images[0].origin == "lower"
        assert axes.get_xlabel() == "teacher layer (0: embedding)"
        assert axes.get_ylabel() == "teacher layer"
        assert axes.get_title() == "teacher with teacher (standard errors up to 0.004)"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(k) for k in range(13)]

    def test_runs_have_frames_and_their_ends_the_student_layer(self) -> None:
        mapping = LayerMap.of([(1, 2), (2, 3), (4, 9)], 4, 12, "by hand")
        (axes,) = panels(heat_map(mapping, similarity(12, 12)))
        assert frames(axes) == [(0.5, 0.5, 2), (2.5, 2.5, 1), (3.5, 3.5, 6)]
        found = words(axes)
        assert {place: text for place, text in found.items() if text.startswith("S")} == {
            (2, 2): "S1",
            (3, 3): "S2",
            (9, 9): "S4",
        }
        assert found[5, 5] == "1"
        assert found[0, 12] == found[12, 0] == ".60"
        assert len(found) == 13 * 13

    def test_a_map_that_cuts_no_runs_has_its_targets_framed(self) -> None:
        (axes,) = panels(heat_map(reverse(2, 4), similarity(4, 4)))
        assert frames(axes) == [(3.5, 3.5, 1), (1.5, 1.5, 1)]
        assert words(axes)[4, 4] == "S1"
        (axes,) = panels(heat_map(LayerMap.of([(1, 4), (2, 4)], 2, 4, "x"), similarity(4, 4)))
        assert words(axes)[4, 4] == "S1,2"
        everything = LayerMap.of([(s, 4) for s in range(1, 5)], 4, 4, "x")
        (axes,) = panels(heat_map(everything, similarity(4, 4)))
        assert words(axes)[4, 4] == "S1…4"

    def test_colours_are_spread_over_the_blocks(self) -> None:
        teacher = similarity(4, 4)
        teacher.values[0, 1:] = teacher.values[1:, 0] = 0.1  # the embedding is far off
        figure = heat_map(uniform(2, 4), teacher)
        (axes,) = panels(figure)
        assert axes.images[0].get_clim() == pytest.approx((0.7, 1.0))
        assert axes.images[0].get_cmap().name == "viridis"
        bar = cast("Any", axes.images[0]).colorbar
        assert bar.extend == "min"
        assert bar.ax.get_ylabel() == "unbiased CKA"

    def test_equal_similarities_have_colours_too(self) -> None:
        assert _range(np.ones((3, 3))) == pytest.approx((0.95, 1.0))
        assert _range(np.full((3, 3), -0.01)) == pytest.approx((-0.05, 0.0))

    def test_words_are_readable_on_their_colour(self) -> None:
        (axes,) = panels(heat_map(last(4, 12), similarity(12, 12, low=0.0)))
        for text, (x, y) in ((t, t.get_position()) for t in axes.texts):
            red, green, blue, _ = cast("Any", axes.images[0]).to_rgba(shown(axes)[int(y), int(x)])
            light = 0.299 * red + 0.587 * green + 0.114 * blue
            assert text.get_color() == ("black" if light > 0.5 else "white")


class TestStudent:
    def test_entries_have_circles(self) -> None:
        cross = similarity(4, 12, low=0.2, error=0.01)
        figure = heat_map(uniform(4, 12), similarity(12, 12), cross)
        _, axes = panels(figure)
        np.testing.assert_allclose(shown(axes), cross.values.numpy(), atol=1e-7)
        assert axes.get_ylabel() == "student layer"
        assert axes.get_title() == "student with teacher (standard errors up to 0.01)"
        assert circles(axes).keys() == {(3, 1), (6, 2), (9, 3), (12, 4)}
        assert words(axes)[12, 0] == ".20"

    def test_areas_are_shares(self) -> None:
        rows = (Row(1, ((1, 0.25), (2, 0.75))), Row(2, ((4, 1.0),)))
        mapping = LayerMap(rows, 2, 4, "mixed")
        _, axes = panels(heat_map(mapping, similarity(4, 4), similarity(2, 4)))
        found = circles(axes)
        assert found[2, 1] / found[1, 1] == pytest.approx(3)
        assert found[4, 2] / found[1, 1] == pytest.approx(4)
        assert words(axes) == {}  # figures would be hidden by small circles

    def test_the_main_share_is_the_target_among_teacher_layers(self) -> None:
        rows = (Row(1, ((1, 0.25), (2, 0.75))), Row(2, ((4, 1.0),)))
        axes, _ = panels(heat_map(LayerMap(rows, 2, 4, "m"), similarity(4, 4), similarity(2, 4)))
        assert words(axes)[2, 2] == "S1"
        assert frames(axes) == [(1.5, 1.5, 1), (3.5, 3.5, 1)]

    def test_figures_beyond_the_blocks_are_marked_on_the_bar(self) -> None:
        cross = similarity(2, 4, low=0.2)
        cross.values[1:, 1:] = torch.tensor([[0.4, 0.5, 0.5, 0.4], [0.4, 0.5, 0.6, 0.7]])
        _, axes = panels(heat_map(uniform(2, 4), similarity(4, 4), cross))
        assert cast("Any", axes.images[0]).colorbar.extend == "both"


class TestFigure:
    def test_the_title_has_the_origin_and_no_mathematics(self) -> None:
        mapping = LayerMap.of([(2, 4)], 2, 4, "saved: $x_1$, " + "a long reason " * 12)
        figure = heat_map(mapping, similarity(4, 4), title="HiddenStates.2")
        text = figure.get_suptitle()
        first, *rest = text.splitlines()
        assert first == "HiddenStates.2"
        assert " ".join(rest) == mapping.origin.strip()
        assert max(map(len, rest)) <= 60
        figure.draw_without_rendering()

    @pytest.mark.parametrize("depths", [(1, 1), (4, 12), (48, 48), (6, 2)])
    def test_a_png_that_can_be_read(self, tmp_path: Path, depths: tuple[int, int]) -> None:
        student, teacher = depths
        figure = heat_map(
            uniform(student, teacher), similarity(teacher, teacher), similarity(student, teacher)
        )
        save(figure, tmp_path / "new" / "map.png")
        assert (tmp_path / "new" / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        pixels = matplotlib.image.imread(tmp_path / "new" / "map.png")
        up, across, _ = pixels.shape
        assert 600 <= across <= 3300
        assert 600 <= up <= 3300
        assert len({tuple(colour) for colour in pixels[::20, ::20].reshape(-1, 4).tolist()}) > 9

    def test_cells_are_squares_that_hold_their_words(self) -> None:
        figure = heat_map(uniform(48, 48), similarity(48, 48), similarity(48, 48))
        figure.draw_without_rendering()
        teacher, student = panels(figure)
        assert teacher.get_window_extent().x1 < student.get_window_extent().x0  # side by side
        cell = teacher.get_window_extent().width / 49
        assert cell == pytest.approx(teacher.get_window_extent().height / 49, rel=1e-3)
        assert max(text.get_window_extent().width for text in teacher.texts) <= cell
        assert len(teacher.texts) == 48  # no figures in cells this small
        assert len(teacher.get_xticks()) <= 16

    def test_a_shallow_student_stands_below_its_teacher(self) -> None:
        figure = heat_map(uniform(4, 12), similarity(12, 12), similarity(4, 12))
        figure.draw_without_rendering()
        teacher, student = (axes.get_window_extent() for axes in panels(figure))
        assert student.y1 < teacher.y0
        assert student.width == pytest.approx(teacher.width, rel=0.02)

    def test_matrices_of_other_depths_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"similarity has shape \[4, 4\]; .* needs \[5, 5\]"):
            heat_map(uniform(2, 4), similarity(3, 3))
        with pytest.raises(ValueError, match=r"cross has shape \[4, 5\]; .* needs \[3, 5\]"):
            heat_map(uniform(2, 4), similarity(4, 4), similarity(3, 4))


def test_runs_partition_the_teacher_up_to_the_last_target() -> None:
    for student, teacher in itertools.product(range(1, 6), range(5, 9)):
        runs = segments(uniform(student, teacher))
        blocks = [block for first, end in runs for block in range(first, end + 1)]
        assert blocks == list(range(1, teacher + 1))
    assert segments(LayerMap.of([(0, 0), (2, 4)], 2, 4, "embedding")) == []
    assert segments(LayerMap.of([(1, 4), (2, 4)], 2, 4, "twice")) == []


def test_drawing_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, llm_distill.plots; print({'matplotlib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
