"""Which maps race, and what the objectives are under one of them."""

from functools import partial
from typing import Any

import pytest
import torch

from llm_distill import AttentionMaps, HiddenStates, LayerMap, Logits, schedules
from llm_distill.errors import InputError
from llm_distill.layers import (
    LayerEvidence,
    LayerStrategy,
    RaceSettings,
    Similarity,
    auto_race,
    cka,
    coverage,
    explicit,
    last,
    provenance,
    random,
    reverse,
    uniform,
)
from llm_distill.race.candidates import (
    BLOCKWISE,
    Proposal,
    can_start_alone,
    candidates,
    proposals,
    scaled,
    settings_of,
    with_arm,
)
from llm_distill.race.halving import Arm

DEPTHS = (4, 12)


GROUPS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3])
"""Teacher layers that say the same."""


def similar() -> Similarity:
    """Teacher layers: 1 in a group, 0.5 outside."""
    values = 0.5 + 0.5 * (GROUPS[:, None] == GROUPS).float()
    return Similarity(values, torch.zeros_like(values))


def crossed() -> Similarity:
    """Student layers with teacher layers: each has one that stands out."""
    values = torch.full((5, 13), 0.1)
    values[range(5), [0, 1, 5, 6, 12]] = 0.9
    return Similarity(values, torch.full_like(values, 0.01))


EVIDENCE = LayerEvidence(similar(), crossed(), (1, 2, 3, 12))


def proposed(
    *also: LayerStrategy, evidence: LayerEvidence = EVIDENCE, seen: bool = True
) -> dict[str, LayerMap | None]:
    found = proposals(RaceSettings(also=also), DEPTHS, evidence, seen=seen)
    assert len({proposal.name for proposal in found}) == len(found)
    return {proposal.name: proposal.mapping for proposal in found}


class TestSettings:
    def test_those_that_were_written(self) -> None:
        objectives = [Logits(), HiddenStates(layers=partial(auto_race, share=0.1))]
        assert settings_of(objectives) == RaceSettings(share=0.1)
        assert settings_of([HiddenStates(layers=auto_race)]) == RaceSettings()
        assert settings_of([Logits(), HiddenStates(layers=uniform)]) is None
        assert settings_of([HiddenStates(layers=partial(auto_race, race=last(4, 12)))]) is None

    def test_two_minds(self) -> None:
        layers = [partial(auto_race, share=0.1), partial(auto_race, share=0.2)]
        objectives = [HiddenStates(layers=layers[0]), AttentionMaps(layers=layers[1])]
        with pytest.raises(InputError, match="one map for all: write the same weights, share"):
            settings_of(objectives)

    @pytest.mark.parametrize("wrong", [{"share": 1.5}, {"weights": []}, {"weights": [-1.0]}])
    def test_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"layers: auto_race has (share|weights)"):
            settings_of([HiddenStates(layers=partial(auto_race, **wrong))])

    def test_a_strategy_of_the_users_own_is_not_run(self) -> None:
        def mine(student: int, teacher: int, *, race: LayerMap | None = None) -> LayerMap:
            return race or uniform(student, teacher)

        with pytest.raises(InputError, match=r"mine asks for `race`, .* write auto_race with also"):
            settings_of([HiddenStates(layers=mine)])


class TestProposals:
    def test_the_usual_ones(self) -> None:
        found = proposed()
        assert list(found) == ["provenance", "coverage", "last", "middle and last", "uniform"]
        assert found["provenance"] == provenance(*DEPTHS, blocks=EVIDENCE.blocks)
        assert found["coverage"] == coverage(*DEPTHS, similarity=EVIDENCE.similarity)
        middle = found["middle and last"]
        assert middle is not None
        assert middle.pairs == ((2, 6), (4, 12))

    def test_each_map_once(self) -> None:
        """Equal shares of what does not change: coverage is uniform."""
        flat = Similarity(torch.ones(13, 13), torch.zeros(13, 13))
        found = proposed(uniform, evidence=LayerEvidence(flat))
        assert list(found) == ["coverage", "last", "middle and last"]
        assert found["coverage"] is not None
        assert found["coverage"].rows == uniform(*DEPTHS).rows

    def test_maps_of_the_users(self) -> None:
        made = LayerMap.of([(1, 2), (4, 12)], *DEPTHS, "by hand")
        other = LayerMap.of([(1, 3), (4, 12)], *DEPTHS, "by hand")
        found = proposed(cka, reverse, made, other, partial(explicit, pairs=[(2, 3)]), random)
        assert list(found)[5:9] == ["cka", "reverse", "by hand", "by hand #2"]
        assert found["by hand #2"] == other
        assert found["cka"] == cka(*DEPTHS, cross=EVIDENCE.cross, similarity=EVIDENCE.similarity)
        assert len(found) == 11

    def test_before_the_data_were_seen(self) -> None:
        found = proposed(cka, reverse, evidence=LayerEvidence(blocks=(1, 2, 3, 12)), seen=False)
        assert [name for name, mapping in found.items() if mapping is None] == [
            "coverage",
            "cka",
        ]

    def test_too_few_data_to_compare_layers(self) -> None:
        assert "coverage" not in proposed(evidence=LayerEvidence())
        with pytest.raises(InputError, match=r"auto_race: also: cka: .* was not measured"):
            proposed(cka, evidence=LayerEvidence())

    def test_shallow_models(self) -> None:
        found = proposals(RaceSettings(), (1, 1), LayerEvidence(), seen=True)
        assert [proposal.name for proposal in found] == ["last"]

    @pytest.mark.parametrize(
        ("also", "message"),
        [
            (partial(explicit, pairs=[(9, 1)]), "student layer 9 is out of range"),
            (uniform(2, 3), "is for a student of 2 blocks"),
            (provenance, "this student was not cut"),
            (auto_race, "a race in a race; leave it out"),
        ],
    )
    def test_maps_that_cannot_be(self, also: LayerStrategy, message: str) -> None:
        for seen in (False, True):
            with pytest.raises(InputError, match=rf"auto_race: also.*{message}"):
                proposed(also, evidence=LayerEvidence(), seen=seen)


class TestCandidates:
    PROPOSED = (
        Proposal("coverage", uniform(*DEPTHS)),
        Proposal("last", last(*DEPTHS)),
        Proposal("mine", reverse(*DEPTHS), own=True),
        Proposal("later", None, own=True),
    )

    def race(self, *, refused: str = "", alone: bool = False, blockwise: bool = True) -> list[Arm]:
        def fit(arm: Arm) -> None:
            if refused in arm.describe() and refused:
                raise InputError(f"no {refused}")

        settings = RaceSettings(weights=(1.0, 3.0, 10.0))
        return candidates(self.PROPOSED, settings, alone=alone, blockwise=blockwise, fit=fit)

    def test_all_at_the_middle_weight(self) -> None:
        arms = self.race()
        assert [arm.describe() for arm in arms] == [
            "coverage x 3",
            "last x 3",
            "mine x 3",
            "coverage x 3, blockwise 33%",
            "none",
        ]
        assert arms[3].blockwise == BLOCKWISE

    def test_nothing_else_to_learn_from(self) -> None:
        names = [arm.name for arm in self.race(alone=True, blockwise=False)]
        assert names == ["coverage", "last", "mine"]

    def test_what_nobody_asked_for_may_not_fit(self) -> None:
        assert "last" not in [arm.name for arm in self.race(refused="last")]
        assert not any(arm.blockwise for arm in self.race(refused="blockwise"))

    def test_what_somebody_asked_for_has_to(self) -> None:
        with pytest.raises(InputError, match="auto_race: also: mine: no mine"):
            self.race(refused="mine")


class TestWithArm:
    def test_map_and_weight(self) -> None:
        kept = HiddenStates(layers=last, name="kept")
        raced = HiddenStates(layers=auto_race, weight=0.5), AttentionMaps(layers=auto_race)
        mapping = uniform(*DEPTHS)
        found = with_arm([Logits(), kept, *raced], Arm("uniform", mapping, 3.0))
        assert found == (
            Logits(),
            kept,
            HiddenStates(layers=mapping, weight=1.5),
            AttentionMaps(layers=mapping, weight=3.0),
        )

    def test_no_hint(self) -> None:
        kept = HiddenStates(layers=last, name="kept")
        raced = HiddenStates(layers=auto_race), AttentionMaps(layers=auto_race)
        assert with_arm([Logits(), kept, *raced], Arm("none", None)) == (Logits(), kept)

    def test_one_objective_lets_blocks_learn_alone(self) -> None:
        raced = AttentionMaps(layers=auto_race), *[HiddenStates(layers=auto_race)] * 2
        found = with_arm(raced, Arm("uniform", uniform(*DEPTHS), blockwise=0.25))
        assert [o.blockwise for o in found if isinstance(o, HiddenStates)] == [0.25, 0.0]

    def test_who_can_start_alone(self) -> None:
        raced = HiddenStates(layers=auto_race)
        assert can_start_alone([Logits(), raced])
        assert not can_start_alone([AttentionMaps(layers=auto_race), HiddenStates()])
        assert not can_start_alone([raced, HiddenStates(blockwise=0.2)])


@pytest.mark.parametrize(
    "schedule",
    [
        partial(schedules.constant, value=0.5),
        partial(schedules.linear, start=1.0, end=0.1, until=0.6),
        partial(schedules.cosine, start=1.0, end=0.0),
        partial(schedules.step, before=1.0, after=0.2, at=0.3),
        partial(schedules.step, 0.2, before=1.0, after=0.2),
        lambda progress: 1.0 - progress,
    ],
)
def test_schedules_are_scaled_everywhere(schedule: Any) -> None:
    if isinstance(schedule, partial) and schedule.args:
        schedule = lambda progress: 0.2  # noqa: E731  any function of the progress
    for by in (1.0, 3.0):
        for progress in (0.0, 0.2, 0.5, 0.9, 1.0):
            expected = by * schedules.at(schedule, progress)
            assert schedules.at(scaled(schedule, by), progress) == pytest.approx(expected)


def test_ours_stay_themselves() -> None:
    weight = partial(schedules.linear, start=1.0, end=0.0, until=0.6)
    told = schedules.describe(scaled(weight, 3.0))
    assert told == "linear(start=3.0, end=0.0, until=0.6)"
    assert scaled(weight, 1.0) is weight
