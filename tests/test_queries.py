"""Queries: sampling from (seed, example, epoch), weights that make a sample unbiased, blocks."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import pytest
import torch
from torch import Tensor

from llm_distill.queries import Block, Queries, sample_queries
from llm_distill.rows import IGNORED, Rows, example_keys, supervised_rows, valid_rows

Side = Literal["left", "right"]


def padded(sequences: Sequence[Sequence[int]], filler: int, side: Side, width: int) -> Tensor:
    """One block, `[B, T]`."""
    blank = [[filler] * (width - len(s)) for s in sequences]
    rows = [[*b, *s] if side == "left" else [*s, *b] for b, s in zip(blank, sequences, strict=True)]
    return torch.tensor(rows)


def places(queries: Queries) -> list[list[int]]:
    """The positions that count, of each sequence."""
    return [p[u].tolist() for p, u in zip(queries.position, queries.used, strict=True)]


def many(
    side: Side, width: int, *, rows_each: Sequence[int] = (20, 3, 11, 0)
) -> tuple[Rows, tuple[int, ...]]:
    """Rows and keys of sequences with these numbers of supervised tokens."""
    sequences = [[100 * k + j for j in range(n + 1)] for k, n in enumerate(rows_each)]
    ids, mask = (
        padded(sequences, 2, side, width),
        padded([[1] * len(s) for s in sequences], 0, side, width),
    )
    labels = padded(sequences, IGNORED, side, width)
    return supervised_rows(ids, mask, labels, shift=True), example_keys(ids, mask)


def test_queries_are_rows_in_ascending_order() -> None:
    rows, keys = many("right", 25)
    queries = sample_queries(rows, keys, most=5, seed=1, epoch=0)
    assert queries.per_sequence == (5, 3, 5, 0)
    assert len(queries) == 13
    assert queries.position.shape == queries.used.shape == (4, 5)
    for number, chosen in enumerate(places(queries)):
        own = rows.position[rows.sequence == number].tolist()
        assert set(chosen) <= set(own)
        assert chosen == sorted(set(chosen))
    assert torch.equal(queries.flat, queries.used.flatten().nonzero()[:, 0])


def test_unused_places_repeat_a_real_query() -> None:
    rows, keys = many("left", 25)
    queries = sample_queries(rows, keys, most=5, seed=1, epoch=0)
    assert queries.position[1, 3:].tolist() == [queries.position[1, 0].item()] * 2
    assert queries.position[3].tolist() == [0] * 5
    assert not queries.used[3].any()


@pytest.mark.parametrize("most", [None, 20, 1000])
def test_all_rows_where_they_fit(most: int | None) -> None:
    rows, keys = many("left", 25)
    queries = sample_queries(rows, keys, most=most, seed=1, epoch=0)
    assert queries.per_sequence == rows.per_sequence
    assert [p for chosen in places(queries) for p in chosen] == rows.position.tolist()


def test_queries_depend_on_seed_example_and_epoch_alone() -> None:
    rows, keys = many("right", 25)
    start = [0, 0, 0, 0]
    base = places(sample_queries(rows, keys, most=4, seed=1, epoch=2))
    assert places(sample_queries(rows, keys, most=4, seed=1, epoch=2)) == base
    torch.manual_seed(99)  # the global generator has no say
    for side, width in (("left", 25), ("left", 40), ("right", 40)):
        other, its_keys = many(side, width)  # type: ignore[arg-type]  # words, which mypy calls str
        start = [width - n if side == "left" else 0 for n in (21, 4, 12, 1)]
        found = places(sample_queries(other, its_keys, most=4, seed=1, epoch=2))
        assert [[p - s for p in c] for c, s in zip(found, start, strict=True)] == base
    assert places(sample_queries(rows, keys, most=4, seed=2, epoch=2)) != base
    assert places(sample_queries(rows, keys, most=4, seed=1, epoch=3)) != base


def test_other_examples_draw_other_queries() -> None:
    rows, keys = many("right", 25, rows_each=(20, 20))
    drawn = [places(sample_queries(rows, keys, most=4, seed=1, epoch=epoch)) for epoch in range(5)]
    assert any(first != second for first, second in drawn)


def test_no_row_is_drawn_twice() -> None:
    rows, keys = many("right", 25, rows_each=(20,))
    for epoch in range(20):
        chosen = places(sample_queries(rows, keys, most=15, seed=1, epoch=epoch))[0]
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 15


def test_queries_do_not_depend_on_the_rest_of_the_batch() -> None:
    rows, keys = many("right", 25)
    together = places(sample_queries(rows, keys, most=4, seed=1, epoch=0))
    alone = places(sample_queries(rows.first(1), keys[:1], most=4, seed=1, epoch=0))
    assert alone == together[:1]


def test_sampling_leaves_the_global_generator_alone() -> None:
    rows, keys = many("right", 25)
    before = torch.random.get_rng_state()
    sample_queries(rows, keys, most=4, seed=1, epoch=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_row_is_drawn_equally_often() -> None:
    """Over 2,000 epochs each of 20 rows is in a sample of 5 with probability 1/4, to 5 sigma."""
    rows, keys = many("right", 25, rows_each=(20,))
    epochs, counts = 2000, torch.zeros(21)
    for epoch in range(epochs):
        queries = sample_queries(rows, keys, most=5, seed=7, epoch=epoch)
        counts[queries.position[0]] += 1
    sigma = (0.25 * 0.75 / epochs) ** 0.5
    assert (counts[:20] / epochs - 0.25).abs().max() < 5 * sigma
    assert counts[20] == 0  # the last position predicts nothing


def test_no_rows_at_all_keep_one_unused_place() -> None:
    rows, keys = many("right", 3, rows_each=(0, 0))
    queries = sample_queries(rows, keys, most=4, seed=1, epoch=0)
    assert queries.position.shape == (2, 1)
    assert len(queries) == 0
    assert queries.flat.shape == (0,)


def test_no_sequences_at_all() -> None:
    nothing = torch.zeros(0, 4, dtype=torch.long)
    queries = sample_queries(valid_rows(nothing, None), (), most=4, seed=1, epoch=0)
    assert len(queries) == 0
    assert queries.position.shape == (0, 1)


def test_keys_for_each_sequence_are_needed() -> None:
    rows, keys = many("right", 25)
    with pytest.raises(ValueError, match="shorter than"):
        sample_queries(rows, keys[:-1], most=4, seed=1, epoch=0)


def weighted(queries: Queries, values: Tensor) -> float:
    """The estimate of the mean over all rows from `[B, T]` values of all positions."""
    chosen = values.gather(1, queries.position) * queries.weight
    return float(chosen.sum()) / queries.total


def test_weights_count_all_rows() -> None:
    rows, keys = many("left", 25)
    queries = sample_queries(rows, keys, most=5, seed=1, epoch=0)
    assert queries.total == 20 + 3 + 11
    assert queries.weight.sum(1).tolist() == [20, 3, pytest.approx(11), 0]
    assert torch.equal(queries.weight > 0, queries.used)
    everything = sample_queries(rows, keys, most=None, seed=1, epoch=0)
    assert everything.total == len(everything) == len(rows)
    assert torch.equal(everything.weight, everything.used.float())


def test_a_sample_is_unbiased_for_the_mean_over_all_rows() -> None:
    """All subsets alike, by hand: their mean estimate is the mean over rows of uneven sequences."""
    counts, most = (5, 2, 4), 2
    values = torch.arange(15, dtype=torch.float64).view(3, 5).square()
    exact = sum(float(values[k, :n].sum()) for k, n in enumerate(counts)) / sum(counts)
    estimate = 0.0
    for sequence, count in enumerate(counts):
        subsets = list(combinations(range(count), min(most, count)))
        for chosen in subsets:
            queries = sample_queries(one(chosen, count), (0,), most=None, seed=0, epoch=0)
            weight = count / len(queries)
            estimate += weight * float(values[sequence, list(chosen)].sum()) / len(subsets)
    assert estimate / sum(counts) == pytest.approx(exact, rel=1e-12)


def one(chosen: Sequence[int], count: int) -> Rows:
    """Rows at these positions of one sequence."""
    mask = torch.zeros(1, count, dtype=torch.long)
    mask[0, list(chosen)] = 1
    return valid_rows(torch.zeros(1, count, dtype=torch.long), mask)


def test_the_mean_over_epochs_is_the_mean_over_all_rows() -> None:
    """Within 4 standard errors, where plain means over the sampled rows are far off."""
    rows, keys = many("right", 25)
    values = torch.arange(100, dtype=torch.float64).view(4, 25)
    exact = float(values[rows.sequence, rows.position].mean())
    found, plain = [], []
    for epoch in range(1000):
        queries = sample_queries(rows, keys, most=3, seed=5, epoch=epoch)
        found.append(weighted(queries, values))
        plain.append(float(values.gather(1, queries.position)[queries.used].mean()))
    estimates = torch.tensor(found)
    error = float(estimates.std()) / len(found) ** 0.5
    assert abs(float(estimates.mean()) - exact) < 4 * error
    assert abs(sum(plain) / len(plain) - exact) > 40 * error


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("places", [1, 2, 7, 20, 40, 1000])
def test_blocks_cover_every_place_once(side: Side, places: int) -> None:
    rows, keys = many(side, 25)
    queries = sample_queries(rows, keys, most=None, seed=1, epoch=0)
    width = queries.position.shape[1]
    seen = torch.zeros(4, width, dtype=torch.long)
    maps = torch.arange(4 * width).view(4, 1, width, 1)
    for block in queries.blocks(places):
        few = block.of(maps)
        assert few.shape[0] * few.shape[2] <= max(places, 1)
        chosen = block.rows(few)
        assert len(chosen) == len(block.weight)
        seen.view(-1)[chosen.flatten()] += 1
        assert torch.equal(block.weight, queries.weight.flatten()[chosen.flatten()])
        back = block.back(chosen, len(few))
        inside = queries.used[block.sequences, block.columns][:, None, :, None]
        assert torch.equal(back, torch.where(inside, few, 0))
    assert torch.equal(seen, queries.used.long())


def test_blocks_are_even() -> None:
    rows, keys = many("right", 25, rows_each=(20,))
    queries = sample_queries(rows, keys, most=None, seed=1, epoch=0)
    sizes = [len(block.weight) for block in queries.blocks(9)]
    assert sizes == [7, 7, 6]


def test_what_all_sequences_share_is_shared_by_a_block() -> None:
    block = Block(slice(2, 4), slice(0, 3), None, torch.ones(6))
    assert block.of(torch.zeros(1, 2, 5, 7)).shape == (1, 2, 3, 7)
    assert block.of(torch.zeros(4, 2, 5, 7)).shape == (2, 2, 3, 7)


def test_queries_move_as_one() -> None:
    rows, keys = many("right", 25)
    moved = sample_queries(rows, keys, most=2, seed=0, epoch=0).to("meta")
    tensors = moved.position, moved.used, moved.flat, moved.weight
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(moved) == sum(moved.per_sequence)
