"""Segmentation, coverage, arc length and auto: brute force, and matrices whose answer is known."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill.layers import (
    LayerMap,
    Similarity,
    arc_length,
    auto,
    coverage,
    covered,
    explicit,
    last,
    learned,
    reverse,
    score,
    segmentation,
    uniform,
)

DEPTHS = [(1, 1), (1, 7), (2, 7), (3, 8), (4, 10), (5, 5), (6, 13), (7, 24), (12, 13)]


def of(values: Tensor) -> Similarity:
    return Similarity(values, torch.zeros_like(values))


def symmetric(depth: int, seed: int) -> Tensor:
    values = torch.rand(depth + 1, depth + 1, generator=torch.Generator().manual_seed(seed))
    return (values + values.mT) / 2


def ends(mapping: LayerMap) -> list[int]:
    return [t for _, t in mapping.pairs]


def value(values: Tensor, cut: Sequence[int]) -> float:
    """The score of a segmentation, from its definition."""
    start, total = 1, 0.0
    for end in cut:
        for j in range(start, end + 1):
            total += float(values[j, end])
        start = end + 1
    return total


def close(values: Tensor, targets: Sequence[int]) -> float:
    """The score of a coverage, from its definition."""
    total = 0.0
    for j in range(1, len(values)):
        around = [min(t for t in targets if t >= j), *[t for t in targets if t < j][-1:]]
        total += max(float(values[j, t]) for t in around)
    return total


class TestSegmentation:
    def test_it_is_what_brute_force_finds_on_200_random_matrices(self) -> None:
        for seed in range(200):
            depth, segments = 3 + seed % 7, 1 + seed % 4
            segments = min(segments, depth)
            values = symmetric(depth, seed)
            cuts = [(*cut, depth) for cut in itertools.combinations(range(1, depth), segments - 1)]
            best = max(cuts, key=lambda cut: value(values, cut))
            found = segmentation(segments, depth, similarity=of(values))
            assert ends(found) == list(best), seed
            assert score(found, of(values)) * depth == pytest.approx(value(values, best))

    def test_ties_go_to_the_map_closest_to_uniform(self) -> None:
        """Blocks 1 to 3 are one run, 4 to 12 are all alike: only the first end is decided."""
        values = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3), torch.ones(9, 9))
        assert ends(segmentation(2, 12, similarity=of(values))) == [3, 12]
        assert ends(segmentation(3, 12, similarity=of(values))) == [3, 8, 12]
        assert ends(segmentation(4, 12, similarity=of(values))) == [3, 6, 9, 12]

    def test_a_gain_beyond_ties_wins(self) -> None:
        values = torch.full((13, 13), 0.9, dtype=torch.float64)
        values[2, 5] += 1e-4
        values[1, 5] += 1e-4
        assert ends(segmentation(2, 12, similarity=of(values))) == [5, 12]

    @pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (6, 1), (3, 1, 4), (2, 5, 1, 1, 7)])
    def test_block_diagonal_similarity_gives_the_ends_of_the_blocks(
        self, sizes: tuple[int, ...]
    ) -> None:
        values = torch.block_diag(torch.ones(1, 1), *(torch.ones(n, n) for n in sizes))
        mapping = segmentation(len(sizes), sum(sizes), similarity=of(values))
        assert ends(mapping) == list(itertools.accumulate(sizes))
        assert score(mapping, of(values)) == 1.0

    def test_the_table_shows_what_it_rests_on(self) -> None:
        values = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(4, 4))
        assert str(segmentation(2, 6, similarity=of(values))).splitlines() == [
            "student layer | teacher layer   segmentation",
            "            1 | 2 of 6",
            "            2 | 6 of 6",
            "mean similarity to the end of the segment: 1",
            "the same for uniform: 0.6667",
        ]


class TestCoverage:
    def test_it_is_what_brute_force_finds_on_200_random_matrices(self) -> None:
        for seed in range(200):
            depth, segments = 3 + seed % 7, 1 + seed % 4
            segments = min(segments, depth)
            values = symmetric(depth, seed)
            cuts = [(*cut, depth) for cut in itertools.combinations(range(1, depth), segments - 1)]
            best = max(cuts, key=lambda cut: close(values, cut))
            found = coverage(segments, depth, similarity=of(values))
            assert close(values, ends(found)) == pytest.approx(close(values, best), abs=1e-4), seed
            assert covered(found, of(values)) * depth == pytest.approx(close(values, ends(found)))

    @pytest.mark.parametrize(("student", "teacher"), [(1, 5), (2, 6), (3, 9), (4, 12), (3, 24)])
    def test_even_change_is_covered_evenly(self, student: int, teacher: int) -> None:
        """The first target stands as far from block 1 as others from the middle between two."""
        places = torch.arange(teacher + 1).double()
        values = 1 - (places[:, None] - places).abs() / 100
        found = ends(coverage(student, teacher, similarity=of(values)))
        ways = [after - before for before, after in itertools.pairwise(found)]
        assert not ways or max(ways) - min(ways) <= 1
        assert not ways or abs(found[0] - 1 - max(ways) / 2) <= 1

    @pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (6, 1), (3, 1, 4), (2, 5, 1, 1, 7)])
    def test_every_run_of_equal_blocks_has_a_target(self, sizes: tuple[int, ...]) -> None:
        values = torch.block_diag(torch.ones(1, 1), *(torch.ones(n, n) for n in sizes))
        mapping = coverage(len(sizes), sum(sizes), similarity=of(values))
        borders = [0, *itertools.accumulate(sizes)]
        runs = [range(b + 1, e + 1) for b, e in itertools.pairwise(borders)]
        assert all(end in run for end, run in zip(ends(mapping), runs, strict=True))
        assert covered(mapping, of(values)) == 1.0

    def test_a_long_run_does_not_fall_to_the_first_block(self) -> None:
        """Slow change at first, fast at the end: a segment would end half way up."""
        way = torch.tensor([0.0, 0.5, 0.52, 0.53, 0.54, 0.55, 0.56, 0.6, 0.65, 0.7, 0.8, 0.9, 1.3])
        values = 1 - (way[:, None] - way).abs() / 2
        assert ends(segmentation(4, 12, similarity=of(values)))[0] == 6
        assert ends(coverage(4, 12, similarity=of(values)))[0] == 3

    def test_the_table_shows_what_it_rests_on(self) -> None:
        values = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(4, 4))
        assert str(coverage(2, 6, similarity=of(values))).splitlines() == [
            "student layer | teacher layer   coverage",
            "            1 | 2 of 6",
            "            2 | 6 of 6",
            "mean similarity to the nearer target: 1",
            "the same for uniform: 0.6667",
        ]


@pytest.mark.parametrize("strategy", [segmentation, coverage])
class TestBoth:
    """What segmentation and coverage have in common."""

    @pytest.mark.parametrize(("student", "teacher"), DEPTHS)
    @pytest.mark.parametrize("level", [0.0, 0.1, 0.9, 1.0])
    def test_constant_similarity_gives_uniform(
        self, strategy: Any, student: int, teacher: int, level: float
    ) -> None:
        """Rounding of the measurement decides nothing, nor does a layer's likeness to itself."""
        for seed, noise, itself in ((0, 0.0, level), (1, 1e-8, level), (2, 1e-8, 1.0)):
            same = level + noise * (symmetric(teacher, seed).double() - 0.5)
            same.fill_diagonal_(itself)
            assert strategy(student, teacher, similarity=of(same)).rows == (
                uniform(student, teacher).rows
            )

    @pytest.mark.parametrize("depth", [1, 2, 7, 24])
    def test_equal_depths_give_the_identity(self, strategy: Any, depth: int) -> None:
        mapping = strategy(depth, depth, similarity=of(symmetric(depth, 3)))
        assert mapping.pairs == tuple((k, k) for k in range(1, depth + 1))

    def test_the_embedding_is_nothing_to_stand_for(self, strategy: Any) -> None:
        values = symmetric(9, 0)
        other = values.clone()
        other[0], other[:, 0] = 100.0, -100.0
        assert strategy(4, 9, similarity=of(values)) == strategy(4, 9, similarity=of(other))

    def test_a_deeper_student_takes_every_teacher_block(self, strategy: Any) -> None:
        mapping = strategy(7, 3, similarity=of(symmetric(3, 0)))
        assert mapping.pairs == ((2, 1), (5, 2), (7, 3))
        assert "student deeper: one row per teacher block" in mapping.origin

    def test_deep_models_take_a_moment(self, strategy: Any) -> None:
        values = symmetric(126, 1)
        mapping = strategy(48, 126, similarity=of(values))
        scored = score if strategy is segmentation else covered
        assert len(mapping.rows) == 48
        assert scored(mapping, of(values)) >= scored(uniform(48, 126), of(values))


class TestArcLength:
    @pytest.mark.parametrize(("student", "teacher"), DEPTHS)
    @pytest.mark.parametrize("level", [0.5, 0.9, 1.0])
    def test_constant_change_gives_uniform(self, student: int, teacher: int, level: float) -> None:
        same = torch.full((teacher + 1, teacher + 1), level)
        same[0, 1] = same[1, 0] = 0.1  # the step from the embedding is of another kind
        assert arc_length(student, teacher, similarity=of(same)).rows == (
            uniform(student, teacher).rows
        )

    def test_layers_are_dense_where_states_change(self) -> None:
        values = torch.full((11, 11), 0.999)
        for t in (6, 7, 8, 9):
            values[t, t + 1] = 0.5
        assert ends(arc_length(4, 10, similarity=of(values))) == [7, 8, 9, 10]

    def test_the_teacher_of_a_pilot(self) -> None:
        """Neighbours of a trained teacher of 8 blocks; the way is .079, .104 … .633."""
        near = [0.975, 0.982, 0.964, 0.846, 0.901, 0.927, 0.851]
        values = torch.ones(9, 9, dtype=torch.float64)
        for t, value_of in enumerate(near, start=1):
            values[t, t + 1] = value_of
        assert ends(arc_length(3, 8, similarity=of(values))) == [4, 6, 8]

    def test_it_rises_strictly(self) -> None:
        """One step holds all the change: the targets of all rows but the last fall together."""
        values = torch.ones(9, 9)
        values[4, 5] = 0.0
        found = ends(arc_length(4, 8, similarity=of(values)))
        assert found == sorted(set(found))
        assert found[-1] == 8


class TestAuto:
    def test_it_is_coverage_up_to_eight_rows(self) -> None:
        values = of(symmetric(20, 0))
        for student in range(1, 9):
            mapping = auto(student, 20, similarity=values)
            assert mapping.rows == coverage(student, 20, similarity=values).rows
            assert mapping.origin == "auto: coverage"

    @pytest.mark.parametrize(("student", "teacher"), [(9, 20), (28, 36), (20, 20), (40, 12)])
    def test_deeper_students_keep_eight_rows_and_the_last(self, student: int, teacher: int) -> None:
        values = of(symmetric(teacher, 0))
        mapping = auto(student, teacher, similarity=values)
        whole = coverage(student, teacher, similarity=values)
        assert len(mapping.rows) == 8
        assert set(mapping.rows) < set(whole.rows)
        assert mapping.pairs[-1] == (student, teacher)
        assert mapping.origin.endswith(f", 8 of {len(whole.rows)} rows by teacher arc length")

    def test_rows_are_spread_evenly_where_nothing_differs(self) -> None:
        same = of(torch.full((25, 25), 0.9))
        assert auto(12, 24, similarity=same, most=4).pairs == ((3, 6), (6, 12), (9, 18), (12, 24))
        assert auto(12, 24, similarity=same, most=1).pairs == ((12, 24),)
        assert auto(12, 12, similarity=of(torch.ones(13, 13)), most=3).pairs == (
            (4, 4),
            (8, 8),
            (12, 12),
        )

    def test_rows_follow_the_change(self) -> None:
        values = torch.full((25, 25), 0.999)
        for t in range(18, 24):
            values[t, t + 1] = values[t + 1, t] = 0.6
        chosen = ends(auto(24, 24, similarity=of(values), most=6))
        assert sum(t >= 18 for t in chosen) >= 5

    @pytest.mark.parametrize("most", [0, -3])
    def test_no_rows_are_refused(self, most: int) -> None:
        with pytest.raises(ValueError, match=f"auto asks for at most {most} rows; write a number"):
            auto(3, 6, similarity=of(torch.ones(7, 7)), most=most)


class TestScore:
    def test_segmentation_has_the_highest(self) -> None:
        values = symmetric(12, 5)
        best = score(segmentation(4, 12, similarity=of(values)), of(values))
        for cut in itertools.combinations(range(1, 12), 3):
            pairs = list(enumerate((*cut, 12), start=1))
            found = score(explicit(4, 12, pairs=pairs), of(values))
            assert found == pytest.approx(value(values, (*cut, 12)) / 12)
            assert found <= best + 1e-9

    def test_maps_that_leave_out_rows_or_blocks(self) -> None:
        values = symmetric(6, 0)
        assert score(last(3, 6), of(values)) == pytest.approx(float(values[1:, 6].sum()) / 6)
        inside = explicit(3, 6, pairs=[[1, 2], [2, 4]])
        assert score(inside, of(values)) == pytest.approx(value(values, (2, 4)) / 6)
        twice = explicit(3, 6, pairs=[[1, 2], [2, 2], [3, 6]])
        assert score(twice, of(values)) == pytest.approx(value(values, (2, 6)) / 6)

    def test_coverage_of_maps_that_leave_out_rows_or_blocks(self) -> None:
        values = symmetric(6, 0)
        assert covered(last(3, 6), of(values)) == pytest.approx(float(values[1:, 6].sum()) / 6)
        inside = explicit(3, 6, pairs=[[1, 2], [2, 4]])
        assert covered(inside, of(values)) == pytest.approx(close(values[:5, :5], (2, 4)) / 6)

    @pytest.mark.parametrize("scored", [score, covered])
    @pytest.mark.parametrize("mapping", [reverse(3, 6), learned(3, 6)])
    def test_maps_without_segments_are_refused(
        self, scored: Callable[[LayerMap, Similarity], float], mapping: LayerMap
    ) -> None:
        with pytest.raises(ValueError, match="has no segments: a score needs one teacher layer"):
            scored(mapping, of(torch.ones(7, 7)))
