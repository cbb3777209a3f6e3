"""The value: what it shows, what it refuses, and its file."""

from pathlib import Path

import pytest
import yaml

from llm_distill.errors import InputError
from llm_distill.layers import LayerMap, Row

SOFT = LayerMap(
    (Row(1, ((5, 0.25), (6, 0.75)), 2.0), Row(2, ((12, 1.0),))),
    2,
    12,
    "transport: ε 0.05",
    evidence=(("mean similarity", 0.95312), ("tiny", 1e-9)),
)


def test_the_table() -> None:
    assert str(LayerMap.of([(1, 2), (2, 12)], 2, 12, "by hand")).splitlines() == [
        "student layer | teacher layer   by hand",
        "            1 | 2 of 12",
        "            2 | 12 of 12",
    ]


def test_the_table_shows_shares_weights_and_evidence() -> None:
    assert str(SOFT).splitlines() == [
        "student layer | teacher layer   transport: ε 0.05",
        "            1 | 5 (25%) + 6 (75%) of 12, weight 2",
        "            2 | 12 of 12, weight 1",
        "mean similarity: 0.9531",
        "tiny: 1e-09",
    ]


def test_the_table_sums_up_small_shares() -> None:
    row = Row(1, ((1, 0.6), (2, 0.392), (3, 0.005), (4, 0.003)))
    lines = str(LayerMap((row,), 1, 4, "learned", trained=True)).splitlines()
    assert lines == [
        "student layer | teacher layer   learned, shares are trained",
        "            1 | 1 (60%) + 2 (39%) + 2 more (0.8%) of 4",
    ]


def test_rows_are_resolved_and_sorted() -> None:
    mapping = LayerMap((Row(-1, ((-1, 0.5), (2, 0.5))), Row(1, ((1, 1.0),))), 4, 10, "by hand")
    assert mapping.rows == (Row(1, ((1, 1.0),)), Row(4, ((2, 0.5), (10, 0.5))))
    assert mapping.pairs == ((1, 1), (4, 2), (4, 10))
    assert mapping.student_layers == {1, 4}
    assert mapping.teacher_layers == {1, 2, 10}
    assert hash(mapping) == hash(mapping(4, 10))


def test_a_student_layer_may_stand_in_several_rows() -> None:
    mapping = LayerMap.of([(2, 5), (2, 3), (1, 3)], 4, 10, "by hand")
    assert mapping.pairs == ((1, 3), (2, 3), (2, 5))
    assert [row.weight for row in mapping.rows] == [1.0, 1.0, 1.0]


def test_it_is_a_strategy_for_its_own_depths() -> None:
    assert SOFT(2, 12) is SOFT
    message = (
        r"this map \(transport: ε 0.05\) is for a student of 2 blocks and a teacher of 12; these "
        r"have 2 and 24: make one for them \(llm-distill map\), or write a strategy such as auto"
    )
    with pytest.raises(ValueError, match=message):
        SOFT(2, 24)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(5, ((1, 1.0),)), r"student layer 5 is out of range 0\.\.4 \(0 is the embedding"),
        (Row(1, ((11, 1.0),)), r"teacher layer 11 is out of range 0\.\.10"),
        (Row(1, ((-11, 1.0),)), r"teacher layer -11 is out of range"),
        (Row(1, ((1, 0.5), (2, 0.4))), r"sum to 0.9, not 1; write \{1: 0.555556, 2: 0.444444\}"),
        (Row(1, ((1, 0.333), (2, 0.333), (3, 0.333))), r"shares that sum to 0.999, not 1"),
        (Row(1, ((1, 1.1),)), r"shares that sum to 1.1, not 1; write \{1: 1\}"),
        (Row(1, ()), r"shares that sum to 0, not 1; name a teacher layer"),
        (Row(1, ((1, 1.5), (2, -0.5))), r"share of -0.5 from teacher layer 2; shares are > 0"),
        (Row(1, ((1, 1.0), (2, 0.0))), r"share of 0.0 from teacher layer 2; .*leave out a layer"),
        (Row(1, ((1, float("nan")),)), "share of nan from teacher layer 1"),
        (Row(1, ((1, 0.5), (1, 0.5))), r"names a teacher layer twice in \[1, 1\]; write its share"),
        (Row(1, ((-1, 0.5), (10, 0.5))), r"names a teacher layer twice in \[10, 10\]"),
        (Row(1, ((1, 1.0),), -1.0), r"student layer 1 has weight -1.0; it must be finite and >= 0"),
        (Row(1, ((1, 1.0),), float("inf")), "weight inf; it must be finite"),
        (Row(1, ((1, 1.0),), float("nan")), "weight nan; it must be finite"),
        (Row(1, ((1, 1.0),), 0.0), r"all rows have weight 0; give one a weight > 0, or leave out"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerMap((row,), 4, 10, "by hand")


def test_shares_may_be_rounded() -> None:
    row = Row(1, ((1, 0.3333333), (2, 0.3333333), (3, 0.3333333)))
    assert LayerMap((row,), 1, 3, "by hand").rows == (row,)


def test_the_same_row_twice_is_refused() -> None:
    twice = (Row(4, ((9, 0.5), (10, 0.5))), Row(-1, ((10, 0.9), (9, 0.1)), 2.0))
    with pytest.raises(
        ValueError,
        match=r"a row stands twice, student layer 4 from teacher layers \[9, 10\]; write",
    ):
        LayerMap(twice, 4, 10, "by hand")


def test_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="by hand maps no layer for depths 4 and 10"):
        LayerMap((), 4, 10, "by hand")


@pytest.mark.parametrize(
    "mapping",
    [
        SOFT,
        LayerMap.of([(0, 0), (1, 3), (1, 6), (2, 6)], 2, 6, "by hand"),
        LayerMap(
            (Row(1, ((1, 0.999999), (2, 1e-6)), 0.0), Row(2, ((2, 1.0),), 1e-5)), 2, 2, "'#: "
        ),
        LayerMap((Row(1, tuple((t, 1 / 24) for t in range(1, 25))),), 1, 24, "x\ny", trained=True),
    ],
)
def test_the_file_gives_the_map_back(mapping: LayerMap, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "map.yaml"
    mapping.save(file)
    assert LayerMap.load(file) == mapping
    assert LayerMap.load(str(file)) == mapping


def test_the_file_is_for_people(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    SOFT.save(file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# A layer map of llm_distill: which layer of the student learns")
    assert "layers: {saved: {path: this file}}" in text
    assert text.splitlines()[-3:] == [
        "rows:",
        "- {student: 1, teacher: {5: 0.25, 6: 0.75}, weight: 2.0}",
        "- {student: 2, teacher: 12}",
    ]
    edited = text.replace("student: 2, teacher: 12", "student: -1, teacher: {-1: 5e-1, 11: 0.5}")
    file.write_text(edited, encoding="utf-8")
    assert LayerMap.load(file).rows[1] == Row(2, ((11, 0.5), (12, 0.5)))


def test_a_file_needs_only_depths_and_rows(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("{student_depth: 2, teacher_depth: 6, rows: [{student: 1, teacher: 3}]}")
    assert LayerMap.load(file) == LayerMap.of([(1, 3)], 2, 6, "saved in mine.yaml")


GOOD: dict[str, object] = {
    "student_depth": 4,
    "teacher_depth": 10,
    "rows": [{"student": 1, "teacher": 3}, {"student": 4, "teacher": 10}],
}


def row(**fields: object) -> dict[str, object]:
    """The good file with its second row changed."""
    return {"rows": [{"student": 1, "teacher": 3}, {"student": 4, "teacher": 10} | fields]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (row(student=5), r"rows\[1\]: layers: student layer 5 is out of range 0\.\.4"),
        (row(teacher=11), r"rows\[1\]: layers: teacher layer 11 is out of range 0\.\.10"),
        (row(teacher={9: 0.5, 10: 0.4}), r"rows\[1\]: .*layer 4 has shares that sum to 0.9"),
        (row(teacher={9: 0.5, 10: -0.5}), r"rows\[1\]: .*share of -0.5 from teacher layer 10"),
        (row(teacher={"x": 1.0}), r"rows\[1\]\.teacher: 'x' is no layer number; write one such"),
        (row(teacher={9: "half"}), r"rows\[1\]\.teacher\[9\]: 'half' is no finite number"),
        (row(teacher={9: True}), r"rows\[1\]\.teacher\[9\]: True is no finite number"),
        (row(teacher=[9, 10]), r"rows\[1\]\.teacher: \[9, 10\] is no layer .* or shares such as"),
        (row(teacher=None), r"rows\[1\]\.teacher: nothing is no layer number"),
        (row(teacher={}), r"rows\[1\]: .*name a teacher layer"),
        (row(student=1.5), r"rows\[1\]\.student: 1.5 is no layer number"),
        (row(student=True), r"rows\[1\]\.student: True is no layer number"),
        (row(weight=-1), r"rows\[1\]: layers: student layer 4 has weight -1.0; it must be"),
        (row(weight="heavy"), r"rows\[1\]\.weight: 'heavy' is no finite number; write one such"),
        (row(wieght=1), r"rows\[1\]: there is no 'wieght' in a layer map; did you mean 'weight'\?"),
        ({"rows": [3]}, r"rows\[0\]: 3 is no row; write \{student: 1, teacher: 3\}"),
        ({"rows": []}, r"rows: \[\] is no list of rows; write \[\{student: 1, teacher: 3\}"),
        ({"rows": {"student": 1}}, r"rows: \{'student': 1\} is no list of rows"),
        ({"rows": [{"student": 1, "teacher": 3}] * 2}, "map.yaml: layers: a row stands twice"),
        ({"rows": [{"student": 1, "teacher": 3, "weight": 0}]}, "layers: all rows have weight 0"),
        ({"student_depth": 0}, r"student_depth: 0 is no number of blocks; write a whole"),
        ({"teacher_depth": "ten"}, r"teacher_depth: 'ten' is no number of blocks"),
        ({"teacher_depth": None}, r"teacher_depth: nothing is no number of blocks"),
        ({"trained": "maybe"}, r"trained: 'maybe' is neither true nor false"),
        ({"origin": 3}, r"origin: 3 is no text; put it in quotes"),
        ({"evidence": [1]}, r"evidence: \[1\] has no names; write \{name: number\}"),
        ({"evidence": {"a": "b"}}, r"evidence\.a: 'b' is no finite number"),
        ({"depth": 3}, r"map.yaml: there is no 'depth' in a layer map; "),
    ],
)  # fmt: skip
def test_bad_entries_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(yaml.safe_dump(GOOD | change), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        LayerMap.load(file)
    assert str(caught.value).startswith(str(file))
