from pathlib import Path
from typing import Any

import pytest

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits
from llm_distill.cli.console import Screen
from llm_distill.cli.deciding import Watched, _kept, mapped, of_configs, of_data
from llm_distill.cli.plan import plan
from llm_distill.errors import InputError
from llm_distill.layers import auto, auto_race, uniform
from llm_distill.objectives import Mapped
from llm_distill.recipe import Recipe
from llm_distill.signals import Request


def decided(content: dict[str, Any], *, reads: bool = True) -> Any:
    recipe = Recipe.of(content)
    args = recipe.arguments()
    planned = plan(recipe, args)
    return of_data(recipe, args, planned, Screen(speaks=False)) if reads else of_configs(planned)


class TestOfConfigs:
    def test_maps_that_need_no_data(self, content: dict[str, Any]) -> None:
        content["objectives"] = ["Logits", {"HiddenStates": {"layers": "skip"}}]
        found = decided(content, reads=False)
        assert found.after["HiddenStates"].layers.pairs == ((1, 2),)
        assert found.evidence.similarity is None

    def test_provenance_is_in_the_config(self, content: dict[str, Any]) -> None:
        content["student"] = {"FromTeacher": {"layers": [1, 2]}}
        content["objectives"] = [{"HiddenStates": {"layers": "provenance"}}]
        found = decided(content, reads=False)
        assert found.after["HiddenStates"].layers.pairs == ((1, 1), (2, 4))

    def test_maps_that_need_data_are_named(self, content: dict[str, Any]) -> None:
        content["objectives"] = [
            {"HiddenStates": {"layers": "auto", "name": "states"}},
            {"AttentionMaps": {"layers": "auto_race"}},
        ]
        with pytest.raises(InputError, match="map of states, AttentionMaps is decided by data"):
            decided(content, reads=False)


class TestOfData:
    def test_what_strategies_ask_for_and_always_the_teacher(self, content: dict[str, Any]) -> None:
        content["objectives"] = [{"HiddenStates": {"layers": "uniform"}}]
        found = decided(content)
        assert found.evidence.similarity.values.shape == (5, 5)
        assert found.evidence.cross is None
        assert found.after["HiddenStates"].layers == uniform(2, 4)
        content["objectives"] = [{"HiddenStates": {"layers": "cka"}}]
        assert decided(content).evidence.cross.values.shape == (3, 5)

    def test_an_adapter_is_on_the_student_that_is_compared(self, content: dict[str, Any]) -> None:
        """It starts at nothing: the figures are those of the bare student."""
        content["objectives"] = [{"HiddenStates": {"layers": "transport"}}]
        bare = decided(content).evidence.cross.values
        out = Path(content["training"]["output_dir"])
        content["training"]["output_dir"] = str(out.with_name("other"))
        content["peft"] = {"r": 2, "target_modules": "all-linear"}
        assert decided(content).evidence.cross.values.equal(bare)

    def test_a_race_that_cannot_be_is_refused_before_weights_load(
        self, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr("llm_distill.loading.load_model", refuse)
        content["objectives"] = ["Logits", {"HiddenStates": {"layers": "auto_race"}}]
        with pytest.raises(InputError, match="steps"):
            decided(content)


def test_objectives_with_maps_by_name() -> None:
    objectives = (Logits(), HiddenStates(), CrossEntropy(), HiddenStates(), AttentionMaps(name="a"))
    assert list(mapped(objectives)) == ["HiddenStates", "HiddenStates.2", "a"]
    with pytest.raises(
        InputError, match=r"no objective here has a layer map \(Logits\); write one"
    ):
        mapped((Logits(),))


class TestAfterARace:
    BEFORE = (HiddenStates(layers=auto_race), Logits(), HiddenStates(layers=auto))

    def test_names_stay(self) -> None:
        won = tuple(o.with_map(uniform(2, 4)) if isinstance(o, Mapped) else o for o in self.BEFORE)
        assert list(_kept(self.BEFORE, won)) == ["HiddenStates", "Logits", "HiddenStates.2"]

    def test_names_stay_where_no_hint_won(self) -> None:
        left = (self.BEFORE[1], self.BEFORE[2])
        assert _kept(self.BEFORE, left) == {"Logits": left[0], "HiddenStates.2": left[1]}


def test_a_watched_teacher_counts_its_answers() -> None:
    class Said:
        asked: list[Any]

        def __init__(self) -> None:
            self.asked = []

        def __call__(self, batch: Any) -> Any:
            return f"signals of {batch}"

        def ask(self, request: Request) -> None:
            self.asked.append(request)

        def close(self) -> None:
            self.asked.append("closed")

    ticks: list[int] = []
    said: Any = Said()
    watched: Any = Watched(said, lambda: ticks.append(1))
    watched.ask(Request(logits=True))
    assert [watched(b) for b in ("a", "b")] == ["signals of a", "signals of b"]
    watched.close()
    assert len(ticks) == 2
    assert said.asked == [Request(logits=True), "closed"]
