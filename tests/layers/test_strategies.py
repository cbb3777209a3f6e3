"""Maps by depth alone: known maps, and maps that cannot be."""

from pathlib import Path

import pytest

from llm_distill.errors import InputError
from llm_distill.layers import (
    LayerMap,
    explicit,
    first,
    last,
    random,
    reverse,
    saved,
    skip,
    uniform,
)


@pytest.mark.parametrize(
    ("student", "teacher", "blocks"),
    [
        (6, 12, (2, 4, 6, 8, 10, 12)),
        (4, 10, (3, 5, 8, 10)),
        (4, 12, (3, 6, 9, 12)),
        (2, 6, (3, 6)),
        (1, 24, (24,)),
        (5, 5, (1, 2, 3, 4, 5)),
        (4, 6, (2, 3, 5, 6)),
    ],
)
def test_uniform_spreads_evenly(student: int, teacher: int, blocks: tuple[int, ...]) -> None:
    assert uniform(student, teacher).pairs == tuple(enumerate(blocks, start=1))


@pytest.mark.parametrize("student", range(1, 13))
@pytest.mark.parametrize("teacher", [1, 2, 7, 24])
def test_uniform_ends_on_the_last_block_and_never_falls(student: int, teacher: int) -> None:
    mapping = uniform(student, teacher)
    blocks = [t for _, t in mapping.pairs]
    assert mapping.student_layers == frozenset(range(1, student + 1))
    assert blocks == sorted(blocks)
    assert blocks[-1] == teacher
    assert min(blocks) >= 1


def test_uniform_of_a_deeper_student_is_many_to_one() -> None:
    assert uniform(4, 2).pairs == ((1, 1), (2, 1), (3, 2), (4, 2))
    assert [t for _, t in uniform(12, 4).pairs][:2] == [1, 1]


def test_last() -> None:
    assert last(4, 10).pairs == ((4, 10),)
    assert last(4, 10, n=3).pairs == ((2, 8), (3, 9), (4, 10))
    assert last(3, 3, n=3).pairs == ((1, 1), (2, 2), (3, 3))


@pytest.mark.parametrize("n", [0, -1, 5])
def test_last_refuses_blocks_that_do_not_exist(n: int) -> None:
    with pytest.raises(ValueError, match=rf"last asks for n={n}.*depths 4 and 10 allow 1..4"):
        last(4, 10, n=n)
    with pytest.raises(ValueError, match=r"allow 1..2"):
        last(4, 2, n=3)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (6, 12, ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10))),
        (4, 10, ((1, 2), (2, 4), (3, 6))),
        (3, 3, ((1, 1), (2, 2))),
        (6, 3, ((1, 1), (2, 2), (3, 3))),
    ],
)
def test_skip(student: int, teacher: int, pairs: tuple[tuple[int, int], ...]) -> None:
    assert skip(student, teacher).pairs == pairs


def test_skip_leaves_nothing_for_one_block() -> None:
    with pytest.raises(ValueError, match=r"skip, stride 12 maps no layer for depths 1 and 12"):
        skip(1, 12)


def test_explicit_counts_negative_layers_from_the_end() -> None:
    mapping = explicit(4, 10, pairs=[[-1, -1], [-4, -10], [0, 0]])
    assert mapping.pairs == ((0, 0), (1, 1), (4, 10))


def test_explicit_many_to_one_either_way() -> None:
    mapping = explicit(4, 10, pairs=[(2, 5), (2, 3), (1, 3)])
    assert mapping.pairs == ((1, 3), (2, 3), (2, 5))
    assert mapping.student_layers == {1, 2}
    assert mapping.teacher_layers == {3, 5}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((5, 1), r"student layer 5 is out of range 0\.\.4 \(0 is the embedding, 4 the last\)"),
        ((-5, 1), r"student layer -5 is out of range 0\.\.4"),
        ((1, 11), r"teacher layer 11 is out of range 0\.\.10"),
        ((1, -11), r"teacher layer -11 is out of range"),
    ],
)
def test_layers_that_do_not_exist_are_refused(pair: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explicit(4, 10, pairs=[pair])


@pytest.mark.parametrize("pair", [[1], [1, 2, 3], [], "12", [1.5, 2], ["1", "2"]])
def test_what_is_no_pair_is_refused(pair: list[int]) -> None:
    with pytest.raises(ValueError, match=r"is not a pair of layer numbers; write \[\[student"):
        explicit(4, 10, pairs=[[1, 1], pair])


def test_the_same_pair_twice_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"a row stands twice, student layer 4 from teacher layers \[10\]; .*use `weight`",
    ):
        explicit(4, 10, pairs=[[4, 10], [-1, -1]])


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="explicit maps no layer"):
        explicit(4, 10, pairs=[])


def test_first() -> None:
    assert first(4, 10).pairs == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert first(4, 10, n=2).pairs == ((1, 1), (2, 2))
    assert first(4, 2).pairs == ((1, 1), (2, 2))
    assert first(1, 9).pairs == ((1, 1),)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_first_refuses_blocks_that_do_not_exist(n: int) -> None:
    with pytest.raises(ValueError, match=rf"first asks for n={n}.*depths 4 and 10 allow 1..4"):
        first(4, 10, n=n)


@pytest.mark.parametrize(("student", "teacher"), [(4, 10), (1, 5), (6, 3), (3, 3)])
def test_reverse_is_uniform_read_backwards(student: int, teacher: int) -> None:
    forward = [t for _, t in uniform(student, teacher).pairs]
    assert [t for _, t in reverse(student, teacher).pairs] == forward[::-1]


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 9), (4, 12), (12, 12), (3, 48)])
def test_random_rises_strictly(student: int, teacher: int) -> None:
    for epoch in range(20):
        pairs = random(student, teacher, seed=3, epoch=epoch).pairs
        blocks = [t for _, t in pairs]
        assert [s for s, _ in pairs] == list(range(1, student + 1))
        assert blocks == sorted(set(blocks))
        assert 1 <= blocks[0] <= blocks[-1] <= teacher


def test_random_of_a_deeper_student_never_falls() -> None:
    blocks = [t for _, t in random(7, 3).pairs]
    assert len(blocks) == 7
    assert blocks == sorted(blocks)
    assert set(blocks) <= {1, 2, 3}


def test_random_is_the_same_on_every_machine() -> None:
    assert random(3, 12).pairs == ((1, 4), (2, 9), (3, 12))
    assert random(3, 12, seed=1, epoch=2).pairs == ((1, 6), (2, 8), (3, 12))


def test_random_is_drawn_anew_by_epoch_and_by_seed() -> None:
    assert len({random(4, 24, epoch=epoch).pairs for epoch in range(30)}) > 25
    assert len({random(4, 24, seed=seed).pairs for seed in range(30)}) > 25


def test_random_draws_every_block_alike() -> None:
    """Over 400 epochs each of 6 blocks is in half of the maps of 3 rows, give or take 5 sigma."""
    drawn = [t for epoch in range(400) for _, t in random(3, 6, epoch=epoch).pairs]
    for block in range(1, 7):
        assert abs(drawn.count(block) - 200) < 50


def test_figures_of_a_saved_map_were_of_the_map_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    LayerMap.of([(1, 3), (2, 6)], 2, 6, "auto", evidence=(("score", 0.9),)).save(file)
    assert saved(2, 6, path=str(file)).evidence == ()


def test_saved(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    uniform(2, 6).save(file)
    found = saved(2, 6, path=str(file))
    assert found.rows == uniform(2, 6).rows
    assert found.origin == f"saved in {file}, from uniform"
    with pytest.raises(ValueError, match=r"is for a student of 2 blocks and a teacher of 6; these"):
        saved(3, 6, path=str(file))
    with pytest.raises(InputError, match=r"there is no layer map at .*none\.yaml"):
        saved(2, 6, path=str(tmp_path / "none.yaml"))
