"""The exact programmes: what brute force finds."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from llm_distill.layers.programmes import cut, rising, spaced, spread


def drawn(rows: int, columns: int, seed: int) -> list[list[float]]:
    values: list[list[float]] = torch.rand(
        rows, columns, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return values


def test_spaced_is_the_most_even_choice() -> None:
    for seed in range(30):
        depth, count = 4 + seed % 6, 1 + seed % 4
        steps = torch.rand(depth, generator=torch.Generator().manual_seed(seed)).double()
        way = steps.cumsum(0).tolist()

        def distance(chosen: Sequence[int], way: list[float], count: int) -> float:
            aims = [way[-1] * k / count for k in range(1, count + 1)]
            return sum(abs(way[i] - aim) for i, aim in zip(chosen, aims, strict=True))

        choices = [(*c, depth - 1) for c in itertools.combinations(range(depth - 1), count - 1)]
        best = min(distance(c, way, count) for c in choices)
        assert distance(spaced(way, count), way, count) == pytest.approx(best, abs=1e-4)


def test_spread() -> None:
    assert spread(4, 4) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert spread(12, 3) == [(4, 1), (8, 2), (12, 3)]
    assert spread(9, 1) == [(9, 1)]


def test_rising_is_what_brute_force_finds() -> None:
    for seed in range(100):
        rows, columns = 1 + seed % 4, 4 + seed % 5
        gain = drawn(rows, columns, seed)
        for anchored in (True, False):
            paths = [
                path
                for path in itertools.combinations(range(1, columns + 1), rows)
                if not anchored or path[-1] == columns
            ]
            best = max(paths, key=lambda p: sum(gain[r][c - 1] for r, c in enumerate(p)))
            assert rising(gain, anchored=anchored) == list(best)


def test_cut_is_what_brute_force_finds() -> None:
    for seed in range(100):
        length, count = 3 + seed % 6, 1 + seed % 3
        gain = drawn(length + 1, length + 1, seed)
        cuts = [(*c, length) for c in itertools.combinations(range(1, length), count - 1)]

        def total(ends: Sequence[int], gain: list[list[float]]) -> float:
            return sum(gain[b][e] for b, e in itertools.pairwise((0, *ends)))

        best = max(cuts, key=lambda ends: total(ends, gain))
        assert cut(gain, count) == list(best), seed


def test_cut_spreads_what_is_equal() -> None:
    assert cut([[0.5] * 13] * 13, 4) == [3, 6, 9, 12]
