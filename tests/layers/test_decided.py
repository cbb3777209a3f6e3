"""Maps from provenance, from training, and from a race."""

from functools import partial

import pytest

from llm_distill.layers import (
    LayerMap,
    RaceSettings,
    auto_race,
    last,
    learned,
    provenance,
    race_settings,
    uniform,
)


class TestProvenance:
    @pytest.mark.parametrize(
        ("blocks", "teacher", "ends"),
        [
            ([1, 4, 8, 12], 12, (3, 7, 11, 12)),
            ([3, 5, 8], 8, (4, 7, 8)),
            ([1, 2, 3], 12, (1, 2, 12)),
            ([1, 2, 3, 4], 4, (1, 2, 3, 4)),
            ([5], 9, (9,)),
            ([9], 9, (9,)),
        ],
    )
    def test_targets_are_the_ends_of_runs(
        self, blocks: list[int], teacher: int, ends: tuple[int, ...]
    ) -> None:
        mapping = provenance(len(blocks), teacher, blocks=blocks)
        assert mapping.pairs == tuple(enumerate(ends, start=1))
        assert mapping.origin == f"provenance, blocks {blocks}"

    def test_of_copies_the_last_one_has_the_row(self) -> None:
        mapping = provenance(5, 3, blocks=[1, 1, 2, 3, 3])
        assert mapping.pairs == ((2, 1), (3, 2), (5, 3))

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ([1, 5], r"has blocks \[1, 5\]; a student of 3 blocks needs 3 numbers in 1\.\.12"),
            ([0, 5, 11], r"needs 3 numbers in 1\.\.12"),
            ([1, 5, 13], r"needs 3 numbers in 1\.\.12"),
            ([], r"has blocks \[\]; a student of 3 blocks"),
            ([1, 7, 5], r"has blocks \[1, 7, 5\], which fall; .* write auto, uniform or explicit"),
        ],
    )
    def test_blocks_that_cannot_be_are_refused(self, blocks: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            provenance(3, 12, blocks=blocks)


class TestLearned:
    @pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 24), (4, 12), (6, 3), (2, 126)])
    @pytest.mark.parametrize("width", [0.05, 0.15, 10.0])
    def test_rows_start_at_a_bell_around_the_diagonal(
        self, student: int, teacher: int, width: float
    ) -> None:
        mapping = learned(student, teacher, width=width)
        assert mapping.trained is True
        assert [row.student for row in mapping.rows] == list(range(1, student + 1))
        for row in mapping.rows:
            assert row.layers == tuple(range(1, teacher + 1))
            top, _ = max(row.teacher, key=lambda entry: entry[1])
            assert abs(top / teacher - row.student / student) <= 0.5 / teacher + 1e-12
        assert mapping.rows[-1].teacher[-1][1] == max(s for _, s in mapping.rows[-1].teacher)

    def test_the_file_keeps_that_it_is_trained(self, tmp_path: object) -> None:
        mapping = learned(3, 9)
        mapping.save(f"{tmp_path}/map.yaml")
        assert LayerMap.load(f"{tmp_path}/map.yaml") == mapping

    @pytest.mark.parametrize("width", [0.0, 0.04, -1.0, float("nan"), float("inf")])
    def test_a_width_that_cannot_be_is_refused(self, width: float) -> None:
        with pytest.raises(ValueError, match=f"learned has width {width}; write a number >= 0.05"):
            learned(3, 9, width=width)


class TestRace:
    def test_the_winner_is_the_map(self) -> None:
        winner = uniform(3, 9)
        assert auto_race(3, 9, race=winner) is winner
        with pytest.raises(ValueError, match="is for a student of 3 blocks and a teacher of 9"):
            auto_race(3, 12, race=winner)

    def test_its_settings_are_carried(self) -> None:
        assert race_settings(auto_race) == RaceSettings((1.0, 3.0, 10.0), 0.04, (), 15)
        mine = uniform(3, 9)
        bound = partial(auto_race, weights=[2.0], share=0.1, also=[mine, last])
        assert race_settings(bound) == RaceSettings((2.0,), 0.1, (mine, last))
        assert race_settings(uniform) is None
        assert race_settings(partial(last, n=2)) is None
        assert race_settings(mine) is None

    @pytest.mark.parametrize(
        ("strategy", "message"),
        [
            (partial(auto_race, shortest=True), r"has shortest True; write a number of steps"),
            (partial(auto_race, shortest=0), r"has shortest 0; write a number of steps from 1 on"),
            (partial(auto_race, weights=[]), r"weights \[\]; write numbers > 0, as \[1, 3, 10\]"),
            (partial(auto_race, weights=[1.0, 0.0]), r"weights \[1.0, 0.0\]; .*arm without a hint"),
            (partial(auto_race, weights=[float("nan")]), r"weights \[nan\]"),
            (
                partial(auto_race, share=0.0),
                r"share 0.0; write a fraction of the steps in \(0, 1\)",
            ),
            (partial(auto_race, share=1.0), r"share 1.0"),
        ],
    )
    def test_settings_that_cannot_be_are_refused(
        self, strategy: partial[LayerMap], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            race_settings(strategy)
        with pytest.raises(ValueError, match=message):
            strategy(3, 9)
