import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from llm_distill import loading, surveying
from llm_distill.cli.map import _flow, _holds, _settings
from llm_distill.layers import LayerMap, uniform
from llm_distill.objectives import HiddenStates
from llm_distill.race import Arm
from llm_distill.race.heats import Heats
from llm_distill.recipe import document
from llm_distill.recipe.components import Components
from llm_distill.recipe.values import Place
from llm_distill.trainer import DistillTrainer
from tests import on_disk
from tests.cli.conftest import Cli, Ended

Race = Callable[..., Ended]

ROOT = Path(__file__).parents[2]
HINTED = ["Logits", {"HiddenStates": {"layers": "auto", "weight": 0.5}}]


def told(ended: Ended) -> list[dict[str, Any]]:
    """The settings to be put into the recipe, read as a recipe reads them."""
    lines = [line for line in ended.out.splitlines() if line.startswith("In the recipe: ")]
    return [
        document.parse("{" + line.removeprefix("In the recipe: ") + "}", "the line")
        for line in lines
    ]


def is_png(file: Path) -> bool:
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestOneObjective:
    def test_it_decides_shows_draws_and_writes(self, cli: Cli, tmp_path: Path) -> None:
        ended = cli("map", objectives=HINTED)
        assert ended.code == 0, ended.err
        out = tmp_path / "out"
        assert files(out) == {"map.yaml", "map.png", surveying.FILE}
        assert is_png(out / "map.png")
        mapping = LayerMap.load(out / "map.yaml")
        assert mapping.origin == "auto: coverage"
        assert mapping.pairs[-1] == (2, 4)
        for words in (
            "HiddenStates: auto: coverage",
            "finishes blocks",
            "CKA of these with their last",
            "mean similarity to the nearer target: ",
            f"HiddenStates: {out}/map.yaml, {out}/map.png",
        ):
            assert words in ended.out
        assert told(ended) == [{"layers": {"saved": {"path": str(out / "map.yaml")}}}]

    def test_it_is_the_map_that_a_training_has(self, cli: Cli, tmp_path: Path) -> None:
        assert cli("map", objectives=HINTED).code == 0
        mapping = LayerMap.load(tmp_path / "out" / "map.yaml")
        ended = cli("run", objectives=HINTED)  # the folder holds no training yet
        assert ended.code == 0, ended.err
        assert all(line in ended.out for line in str(mapping).splitlines())
        assert (tmp_path / "out" / "map.yaml").exists()
        assert cli("run", objectives=HINTED).code == 2  # now it does

    def test_an_edited_map_goes_back_into_the_recipe(self, cli: Cli, tmp_path: Path) -> None:
        ended = cli("map", objectives=HINTED)
        file = tmp_path / "out" / "map.yaml"
        edited = document.parse(file.read_text(), "the map")
        edited["rows"] = [{"student": 1, "teacher": 3}, {"student": 2, "teacher": -1, "weight": 2}]
        file.write_text("# mine\n" + yaml.safe_dump(edited))
        (settings,) = told(ended)
        saved = ["Logits", {"HiddenStates": settings | {"weight": 0.5}}]
        drawn = (tmp_path / "out" / "map.png").read_bytes()
        again = cli("map", objectives=saved)  # to look at it
        assert again.code == 0, again.err
        assert file.read_text().startswith("# mine\n")
        assert (tmp_path / "out" / "map.png").read_bytes() != drawn
        assert told(again) == [settings]
        trained = cli("run", objectives=saved)
        assert trained.code == 0, trained.err
        assert "1 | 3 of 4, weight 1" in trained.out
        assert "2 | 4 of 4, weight 2" in trained.out

    def test_a_map_that_may_have_been_edited_is_not_lost(self, cli: Cli, tmp_path: Path) -> None:
        file = tmp_path / "maps" / "map.yaml"
        uniform(2, 4).save(file)
        before = file.read_text()
        backwards = [{"HiddenStates": {"layers": "reverse"}}]
        ended = cli("map", "-o", str(tmp_path / "maps"), objectives=backwards)
        assert ended.code == 2
        assert f"{file} holds another map, which may have been edited; write --over" in ended.err
        assert file.read_text() == before
        ended = cli("map", "--output", str(tmp_path / "maps"), "--overwrite", objectives=backwards)
        assert ended.code == 0, ended.err
        assert LayerMap.load(file).origin == "reverse"
        assert not (tmp_path / "out").exists()

    def test_decided_maps_are_drawn_on_similarities_too(self, cli: Cli, tmp_path: Path) -> None:
        ended = cli("map", objectives=[{"HiddenStates": {"layers": "uniform"}}])
        assert ended.code == 0, ended.err
        assert is_png(tmp_path / "out" / "map.png")
        assert "CKA of these with their last" in ended.out
        assert LayerMap.load(tmp_path / "out" / "map.yaml") == uniform(2, 4)

    def test_the_student_is_measured_where_a_strategy_asks(
        self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[str] = []
        load = loading.load_model

        def noting(name: str, *args: Any, **kwargs: Any) -> Any:
            loaded.append(Path(name).name)
            return load(name, *args, **kwargs)

        monkeypatch.setattr(loading, "load_model", noting)
        assert cli("map", objectives=HINTED).code == 0
        assert loaded == ["teacher"]
        ended = cli("map", "--overwrite", objectives=[{"HiddenStates": {"layers": "transport"}}])
        assert ended.code == 0, ended.err
        assert sorted(loaded) == ["student", "teacher", "teacher"]
        assert "similarity to the student's" in ended.out
        with safe_open(tmp_path / "out" / surveying.FILE, framework="pt") as file:
            assert file.get_slice("cross.values").get_shape() == [3, 5]

    def test_a_map_that_is_drawn_anew_says_so(self, cli: Cli) -> None:
        ended = cli("map", objectives=[{"HiddenStates": {"layers": "random"}}])
        assert ended.code == 0, ended.err
        assert "random, seed 0, epoch 0" in ended.out
        assert "drawn anew in each epoch; in the recipe this map would stay" in ended.out

    def test_overrides(self, cli: Cli, tmp_path: Path) -> None:
        override = ("--objectives.1.HiddenStates.layers", "{explicit: {pairs: [[1, 1], [2, 4]]}}")
        ended = cli(
            "map", *override, "--training.output_dir", str(tmp_path / "b"), objectives=HINTED
        )
        assert ended.code == 0, ended.err
        assert LayerMap.load(tmp_path / "b" / "map.yaml").pairs == ((1, 1), (2, 4))


class TestSeveralObjectives:
    OBJECTIVES = (
        "Logits",
        {"HiddenStates": {"layers": "auto"}},
        {"AttentionMaps": {"layers": {"last": {"n": 1}}}},
        {"HiddenStates": {"layers": "arc_length", "name": "a b/c"}},
    )

    def test_each_has_files_of_its_own(self, cli: Cli, tmp_path: Path) -> None:
        ended = cli("map", objectives=list(self.OBJECTIVES))
        assert ended.code == 0, ended.err
        stems = ("map-HiddenStates", "map-AttentionMaps", "map-a_b_c")
        assert {f"{stem}.{kind}" for stem in stems for kind in ("yaml", "png")} < files(
            tmp_path / "out"
        )
        paths = [Path(line["layers"]["saved"]["path"]) for line in told(ended)]
        assert [path.stem for path in paths] == list(stems)
        assert LayerMap.load(paths[1]).pairs == ((2, 4),)
        saved = [{"HiddenStates": told(ended)[0]}, {"AttentionMaps": told(ended)[1]}]
        assert cli("check", objectives=saved).code == 0

    def test_names_that_are_one_file(self, cli: Cli) -> None:
        names = ("a b", "a/b")
        same = [{"HiddenStates": {"layers": "uniform", "name": name}} for name in names]
        ended = cli("map", "--no-data", objectives=same)
        assert ended.code == 2
        assert "the names a b, a/b give the same files" in ended.err


class TestRace:
    """The trainings themselves are tests/race's; here their figures are given."""

    @staticmethod
    def objectives(**settings: Any) -> list[Any]:
        race = {"share": 0.05, "weights": [1, 3], "also": [{"explicit": {"pairs": [[1, 2]]}}]}
        hint = {"layers": {"auto_race": race}, "weight": 2, **settings}
        return [{"CrossEntropy": {"weight": 0.1}}, {"HiddenStates": hint}]

    @pytest.fixture
    def race(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Race:
        data = {"path": str(on_disk.save_data(tmp_path / "more.jsonl", rows=40)), "max_length": 32}

        def run(winner: Callable[[Arm], bool], **settings: Any) -> Ended:
            def measure(heats: Heats, arm: Arm, steps: int) -> float:
                return (0.25 if winner(arm) else 0.5) + 1 / steps

            monkeypatch.setattr(Heats, "measure", measure)
            objectives = self.objectives(**settings)
            return cli("map", "--training.max_steps", "20000", objectives=objectives, data=data)

        return run

    def test_the_winner_with_its_weight_and_the_table(self, race: Race, tmp_path: Path) -> None:
        ended = race(lambda arm: arm.name.startswith("explicit") and arm.weight == 3)
        assert ended.code == 0, ended.err
        assert "explicit(pairs=[[1, 2]])" in ended.out
        assert "<- taken" in ended.out
        (settings,) = told(ended)
        assert settings["weight"] == 6.0
        assert LayerMap.load(settings["layers"]["saved"]["path"]).pairs == ((1, 2),)
        assert (tmp_path / "out" / "map.png").exists()
        assert not list((tmp_path / "out").glob("checkpoint*"))

    def test_a_schedule_is_told_by_how_much(self, race: Race) -> None:
        falling = {"linear": {"start": 2, "end": 0}}
        ended = race(lambda arm: arm.mapping is not None and arm.weight == 3, weight=falling)
        assert ended.code == 0, ended.err
        assert "weight" not in told(ended)[0]
        assert "The map won with 3 times its weight." in ended.out

    def test_a_student_that_learns_blockwise_first(self, race: Race) -> None:
        ended = race(lambda arm: arm.blockwise > 0)
        assert ended.code == 0, ended.err
        assert told(ended)[0]["blockwise"] == pytest.approx(1 / 3, abs=1e-3)

    def test_a_training_finds_the_race_that_was_run(
        self, race: Race, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert race(lambda arm: arm.name == "last").code == 0

        def refuse(heats: Heats, arm: Arm, steps: int) -> float:
            raise AssertionError("it was run again")

        def stop(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> None:
            raise FloatingPointError("far enough")

        monkeypatch.setattr(Heats, "measure", refuse)
        monkeypatch.setattr(DistillTrainer, "train", stop)
        data = {"path": str(tmp_path / "more.jsonl"), "max_length": 32}
        ended = cli("run", "--training.max_steps", "20000", objectives=self.objectives(), data=data)
        assert "far enough" in ended.err
        assert "<- taken" in ended.out
        assert "2 | 4 of 4" in ended.out

    def test_no_hint(self, race: Race, tmp_path: Path) -> None:
        ended = race(lambda arm: arm.mapping is None)
        assert ended.code == 0, ended.err
        assert "HiddenStates: no map was better than no hint; leave it out" in ended.out
        assert not told(ended)
        assert not (tmp_path / "out" / "map.yaml").exists()


class TestSettings:
    BEFORE = HiddenStates(layers=uniform(2, 4), weight=2.0)

    def test_weight_and_start_that_won(self) -> None:
        after = HiddenStates(layers=uniform(2, 4), weight=6.0, blockwise=1 / 3)
        settings = _settings(self.BEFORE, self.BEFORE, after, Path("out/map.yaml"))
        assert settings == {
            "layers": {"saved": {"path": "out/map.yaml"}},
            "weight": 6.0,
            "blockwise": 0.333,
        }
        text = "layers: {saved: {path: out/map.yaml}}, weight: 6.0, blockwise: 0.333"
        assert _flow(settings) == text

    def test_nothing_where_nothing_changed(self) -> None:
        settings = _settings(self.BEFORE, self.BEFORE, self.BEFORE, Path("m.yaml"))
        assert settings == {"layers": {"saved": {"path": "m.yaml"}}}

    def test_a_schedule_stays_as_it_is(self) -> None:
        before = HiddenStates(layers=uniform(2, 4), weight=lambda progress: progress)
        after = HiddenStates(layers=uniform(2, 4), weight=lambda progress: 3 * progress)
        assert "weight" not in _settings(before, before, after, Path("m.yaml"))

    @pytest.mark.parametrize("path", ["a b/map.yaml", "a: b/#1.yaml", "ä/{x}.yaml", "null", "'x"])
    def test_paths_are_quoted_as_recipes_read_them(self, path: str) -> None:
        line = "{" + _flow({"layers": {"saved": {"path": path}}}) + "}"
        content = document.parse(line, "the line")
        made = Components()({"HiddenStates": content}, HiddenStates, Place("x"))
        assert made.layers.keywords == {"path": path}


def test_a_file_holds_a_map_wherever_it_says_to_come_from(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    assert not _holds(file, uniform(2, 4))
    LayerMap.of(uniform(2, 4).pairs, 2, 4, "by hand", (("a figure", 1.0),)).save(file)
    assert _holds(file, uniform(2, 4))
    assert not _holds(file, uniform(2, 6))
    file.write_text("rows: 3")
    assert not _holds(file, uniform(2, 4))


class TestBadInput:
    def test_no_objective_with_a_map(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(loading, "load_model", refuse)
        ended = cli("map")
        assert ended.code == 2
        assert "no objective here has a layer map (CrossEntropy, Logits); write one" in ended.err
        assert "`- HiddenStates: {layers: auto}`" in ended.err

    def test_what_run_refuses(self, cli: Cli, tmp_path: Path) -> None:
        ended = cli("map", "--student", "/no/where", objectives=HINTED)
        assert ended.code == 2
        assert "model '/no/where' is not a folder here" in ended.err
        far = {"HiddenStates": {"layers": {"explicit": {"pairs": [[1, 9]]}}}}
        ended = cli("map", objectives=[far])
        assert "layers: teacher layer 9 is out of range 0..4" in ended.err
        other = LayerMap.of([(1, 2)], 3, 6, "of others")
        other.save(tmp_path / "other.yaml")
        saved = {"HiddenStates": {"layers": {"saved": {"path": str(tmp_path / "other.yaml")}}}}
        ended = cli("map", objectives=[saved])
        assert ended.code == 2
        assert "is for a student of 3 blocks and a teacher of 6; these have 2 and 4" in ended.err


class TestNoData:
    def test_maps_that_need_none_are_written_and_nothing_loads(
        self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("weights or data were read")

        monkeypatch.setattr(loading, "load_model", refuse)
        monkeypatch.setattr("llm_distill.data.load", refuse)
        ended = cli("map", "--no-data", objectives=[{"HiddenStates": {"layers": "uniform"}}])
        assert ended.code == 0, ended.err
        assert files(tmp_path / "out") == {"map.yaml"}
        assert "There is no heat map: layers were not compared" in ended.out
        assert "similarity" not in ended.out

    def test_maps_that_need_some_are_refused(self, cli: Cli) -> None:
        ended = cli("map", "--no-data", objectives=HINTED)
        assert ended.code == 2
        assert "--no-data: the layer map of HiddenStates is decided by data; leave" in ended.err


def test_too_few_data_are_said(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n")
    data = {"path": str(tmp_path / "few.jsonl"), "max_length": 32}
    ended = cli("map", objectives=HINTED, data=data)
    assert ended.code == 0, ended.err
    assert "auto: too few training data to compare layers, so uniform" in ended.out
    assert "There is no heat map" in ended.out
    assert not (tmp_path / "out" / "map.png").exists()


def test_nothing_is_trained(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a trainer was made")

    monkeypatch.setattr(DistillTrainer, "__init__", refuse)
    assert cli("map", objectives=HINTED).code == 0


@pytest.mark.distributed
def test_two_processes_decide_one_map_and_one_speaks(
    content: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump({**content, "objectives": HINTED}))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*run, "-m", "llm_distill", "map", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("In the recipe: ") == 1
    assert LayerMap.load(tmp_path / "out" / "map.yaml").pairs[-1] == (2, 4)
    assert is_png(tmp_path / "out" / "map.png")
