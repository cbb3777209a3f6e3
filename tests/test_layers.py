"""Layer maps: known maps, and maps that cannot be."""

import pytest

from llm_distill.layers import LayerMap, explicit, last, skip, uniform


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
    with pytest.raises(ValueError, match=r"a pair stands twice in .*use `weight`"):
        explicit(4, 10, pairs=[[4, 10], [-1, -1]])


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="explicit maps no layer"):
        explicit(4, 10, pairs=[])


def test_the_table() -> None:
    assert str(LayerMap(((1, 2), (2, 12)), 2, 12, "by hand")).splitlines() == [
        "student layer | teacher layer   by hand",
        "            1 | 2 of 12",
        "            2 | 12 of 12",
    ]
