"""What a recipe may say of intermediate layers: losses, items, projectors, layer maps, students."""

# ruff: noqa: E501  tables of cases
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import llm_distill
from llm_distill import layers, losses, projectors
from llm_distill.errors import InputError
from llm_distill.layers import LayerMap, asks, looks, race_settings
from llm_distill.objectives import HiddenStates, Objective
from llm_distill.recipe import Recipe, document
from llm_distill.recipe.components import Components
from llm_distill.recipe.values import Place

RELATIONS = ("attention_transfer", "pkt", "nst", "rkd_distance", "rkd_angle", "cka")


def made(settings: str) -> Any:
    """HiddenStates with settings in YAML, as a recipe reads them."""
    content = document.parse(f"{{HiddenStates: {{{settings}}}}}", "a test")
    return Components()(content, Objective, Place("objectives").entry(1))


class TestLayers:
    @pytest.mark.parametrize(
        "name", [name for name in layers.__all__ if name not in ("LayerMap", "explicit", "saved")]
    )
    def test_every_strategy_by_its_name_alone(self, name: str) -> None:
        assert made(f"layers: {name}").layers is vars(layers)[name]

    def test_what_data_decide_is_not_missing(self) -> None:
        asked = {
            name: asks(made(f"layers: {name}").layers) for name in ("auto", "cka", "auto_race")
        }
        assert asked == {
            "auto": {"similarity"},
            "cka": {"cross", "similarity"},
            "auto_race": {"race"},
        }

    def test_settings(self) -> None:
        assert made("layers: {random: {seed: 3}}").layers.keywords == {"seed": 3}
        assert made("layers: {auto: {most: 4}}").layers.keywords == {"most": 4}
        assert made("layers: {transport: {epsilon: 1e-1}}").layers.keywords == {"epsilon": 0.1}
        assert looks(made("layers: {cka: {refresh: 50}}").layers) == 50
        assert made("layers: {provenance: {blocks: [1, 4]}}").layers(2, 4).pairs == ((1, 3), (2, 4))

    def test_a_saved_map(self, tmp_path: Path) -> None:
        mapping = LayerMap.of([(1, 2), (2, 4)], 2, 4, "by hand")
        mapping.save(tmp_path / "a map.yaml")
        saved = made(f"layers: {{saved: {{path: {tmp_path}/a map.yaml}}}}").layers
        assert saved(2, 4).rows == mapping.rows

    def test_a_race_with_maps_of_the_users_own(self) -> None:
        said = "{share: 0.05, weights: [1, 1e1], also: [skip, {explicit: {pairs: [[1, 2]]}}, {cka: {prior: 0}}]}"
        settings = race_settings(made(f"layers: {{auto_race: {said}}}").layers)
        assert settings is not None
        assert (settings.share, settings.weights) == (0.05, (1.0, 10.0))
        skip, explicit, cka = settings.also
        assert skip is layers.skip
        assert explicit(2, 4).pairs == ((1, 2),)
        assert isinstance(cka, partial)
        assert (cka.func, cka.keywords) == (layers.cka, {"prior": 0.0})

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ("{segmentation: {similarity: 3}}", r"layers\.segmentation\.similarity: it is measured at calibration; leave it out"),
            ("{segmentation: {similarity: null}}", r"similarity: it is measured at calibration"),
            ("{cka: {cross: [[1]]}}", r"layers\.cka\.cross: it is measured at calibration"),
            ("{auto: {refresh: 50}}", r"auto has no 'refresh'; it has most"),
            ("{auto_race: {race: uniform}}", r"layers\.auto_race\.race: a race decides it; leave it out"),
            ("{auto_race: {race: {LayerMap: {rows: []}}}}", "race: a race decides it"),
            ("{auto_race: {also: [{cka: {cross: 1}}]}}", r"also\[0\]\.cka\.cross: it is measured"),
            ("{auto_race: {also: uniform}}", r"also: 'uniform' is not what this takes; write a list"),
            ("{auto_race: {also: [mse]}}", r"also\[0\]: no 'mse' in llm_distill\.layers; it has arc_length"),
            ("{auto_race: {shares: 1}}", "auto_race has no 'shares'; did you mean 'share'"),
            ("{provenance: {blocks: x}}", r"blocks: 'x' is not what this takes; write a list or null"),
            ("{random: {epoch: x}}", "epoch: 'x' is not what this takes; write an integer"),
            ("{saved: {path: 3}}", "path: 3 is not what this takes; write text, in quotes: '3'"),
            ("saved", r"layers\.saved needs path: saved: \{path: …\}"),
            ("null", r"layers: None is no component; write a name"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_meant(self, said: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            made(f"layers: {said}")


class TestLosses:
    @pytest.mark.parametrize("name", [*RELATIONS, "mse", "huber", "cosine", "info_nce"])
    def test_by_name(self, name: str) -> None:
        assert made(f"loss: {name}").loss is vars(losses)[name]

    def test_settings(self) -> None:
        loss = made("loss: {nst: {kernel: gaussian}}").loss
        assert (loss.func, loss.keywords) == (losses.nst, {"kernel": "gaussian"})

    @pytest.mark.parametrize("name", RELATIONS)
    def test_relations_are_public(self, name: str) -> None:
        assert name in llm_distill.__all__


class TestProjectors:
    @pytest.mark.parametrize("name", projectors.__all__)
    def test_by_name(self, name: str) -> None:
        assert made(f"projector: {name}").projector is vars(projectors)[name]

    @pytest.mark.parametrize("said", ["null", "~", ""])
    def test_null_is_the_default_and_none_is_a_projector(self, said: str) -> None:
        assert made(f"projector: {said}").projector is None
        assert made("projector: none").projector is projectors.none

    def test_none_of_python_is_neither(self) -> None:
        with pytest.raises(
            InputError, match=r"no 'None' in llm_distill\.projectors; did you mean 'none'"
        ):
            made("projector: None")


class TestItems:
    def test_pooled_with_a_cap(self) -> None:
        assert made("items: pooled, most: 64") == HiddenStates(items="pooled", most=64)

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ("items: pool", "items: 'pool' is not .* one of token, sequence, pooled; did you mean 'pooled'"),
            ("most: x", "most: 'x' is not what this takes; write an integer or null"),
            ("loss: pkt, most: 1", "most is 1, and pkt needs 3 rows"),
            ("skip: -1", "skip is -1"),
            ("gate: 1", "gate: 1 is not what this takes; write true or false"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_meant(self, said: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            made(said)


class TestStudents:
    def test_cut_from_the_teacher(self) -> None:
        content: dict[str, Any] = {"teacher": "b", "data": {"path": "c"}}
        cut = Recipe.of({"student": {"FromTeacher": {"depth": 4}}, **content})
        assert cut.student == llm_distill.FromTeacher(4)
        named = {"FromTeacher": {"layers": [1, 2, -1]}}
        assert Recipe.of({"student": named, **content}).student == llm_distill.FromTeacher(
            layers=[1, 2, -1]
        )

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"depth": 4, "layers": "end"}, r"student\.FromTeacher\.layers: .*'end'"),
            ({}, "FromTeacher: depth is missing"),
            ({"layers": [0, 1]}, r"layers is \[0, 1\]; write numbers of blocks"),
        ],
    )
    def test_what_cannot_be_cut(self, said: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Recipe.of({"student": {"FromTeacher": said}, "teacher": "b", "data": {"path": "c"}})
