"""Objectives with a layer map: what they know of it before anything was measured."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from llm_distill import HiddenStates
from llm_distill import layers as layer_maps
from llm_distill.layers import LayerMap, Similarity
from llm_distill.objectives import Evidence, Mapped, Objective, Term
from llm_distill.signals import ModelSpec
from tests.objectives.planted import STUDENT, TEACHER

SAME = Similarity(torch.ones(5, 5), torch.zeros(5, 5))


@dataclass(frozen=True, kw_only=True)
class Plain(Mapped):
    """The least an objective with a map has to be."""

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        raise NotImplementedError


class TestMapped:
    def test_it_is_an_objective_that_maps_itself(self) -> None:
        assert issubclass(Mapped, Objective)
        assert Plain().layers is layer_maps.auto
        assert HiddenStates().layers is layer_maps.auto

    @pytest.mark.parametrize(
        ("strategy", "asked"),
        [
            (layer_maps.auto, {"similarity"}),
            (layer_maps.segmentation, {"similarity"}),
            (layer_maps.cka, {"similarity", "cross"}),
            (layer_maps.transport, {"cross"}),
            (layer_maps.provenance, {"blocks"}),
            (layer_maps.auto_race, {"race"}),
            (layer_maps.uniform, set()),
            (layer_maps.learned, set()),
            (layer_maps.random, set()),  # its epoch comes as the training goes
            (partial(layer_maps.auto, similarity=SAME), set()),
            (layer_maps.uniform(2, 4), set()),
        ],
    )
    def test_what_data_decide_is_undecided(
        self, strategy: layer_maps.LayerStrategy, asked: set[str]
    ) -> None:
        assert Plain(layers=strategy).undecided == asked

    def test_until_then_the_map_is_uniform_and_says_so(self) -> None:
        found = Plain().mapping(STUDENT, TEACHER)
        assert found.pairs == ((1, 2), (2, 4))
        assert found.origin == "auto, decided at calibration; until then uniform"
        assert "decided at calibration" in str(found)

    def test_what_is_known_is_there_at_once(self) -> None:
        assert Plain(layers=layer_maps.last).mapping(STUDENT, TEACHER).pairs == ((2, 4),)
        drawn = Plain(layers=layer_maps.random).mapping(STUDENT, TEACHER)
        assert drawn == layer_maps.random(2, 4, epoch=0)

    def test_a_decided_map_takes_its_place(self) -> None:
        decided = LayerMap.of([(2, 3)], 2, 4, "by hand")
        objective = Plain(weight=0.5, name="hint").with_map(decided)
        assert objective == Plain(weight=0.5, name="hint", layers=decided)
        assert objective.mapping(STUDENT, TEACHER) is decided
        with pytest.raises(
            ValueError, match="a student of 2 blocks and a teacher of 4; these have 2 and 2"
        ):
            objective.mapping(STUDENT, STUDENT)

    def test_hints_fade(self) -> None:
        assert Plain().fades


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "auto"}, r"layers is 'auto'; in Python write llm_distill\.layers\.auto"),
        ({"layers": [(1, 3)]}, r"layers is \[\(1, 3\)\]; in Python write a function of"),
        ({"loss": "pkt"}, r"loss is 'pkt'; in Python write llm_distill\.pkt"),
        ({"projector": "mlp"}, r"projector is 'mlp'; in Python write llm_distill\.projectors\.mlp"),
    ],
)
def test_names_are_for_recipes(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiddenStates(**settings)
