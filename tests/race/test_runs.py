"""A race inside a run: what is refused, what is decided, and what is left as it was."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llm_distill import AttentionMaps, DistillTrainer, HiddenStates, LayerMap, Logits
from llm_distill import layers as strategies
from llm_distill.balance import normalised
from llm_distill.errors import InputError
from llm_distill.layers import auto_race, reverse
from llm_distill.teachers import Local
from tests import tiny
from tests.racing import RACE, deep, equal, named, trainer, weights


class Counted(TrainerCallback):
    """Trainings that began."""

    begun = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun += 1


class TestRefusedBeforeTheTeacherLoads:
    @pytest.fixture(autouse=True)
    def _unread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("the teacher was loaded")

        monkeypatch.setattr(Local, "load", load)

    def refused(self, folder: Path, message: str, layers: Any = RACE, **given: Any) -> None:
        with pytest.raises(InputError, match=message):
            trainer(folder, Logits(), HiddenStates(layers=layers), **named(folder), **given)

    def test_too_few_steps(self, tmp_path: Path) -> None:
        self.refused(
            tmp_path,
            layers=partial(RACE, shortest=5),
            message="share 0.9 of 40 steps are 36, and a race of 5 maps with 1 weights takes at "
            "least 120; train 134 steps, write fewer weights, or auto",
        )
        message = r"share 0.04 of 1000 steps are 40, .* at least 480; write share: 0.48, train"
        self.refused(tmp_path, message, layers=auto_race, max_steps=1000)

    def test_the_share_it_names_is_enough(self, tmp_path: Path) -> None:
        """32 steps of 40: nothing is refused before the teacher is read."""
        layers = partial(auto_race, share=0.8, shortest=1)
        with pytest.raises(AssertionError, match="was loaded"):
            self.refused(tmp_path, "nothing", layers=layers, max_steps=40)

    def test_settings(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "has share 3", layers=partial(auto_race, share=3))

    def test_examples(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "there are 5 examples", train_dataset=tiny.rows(5))

    def test_a_stream_without_a_length(self, tmp_path: Path) -> None:
        stream = tiny.rows(64).to_iterable_dataset()
        self.refused(tmp_path, "write max_steps", train_dataset=stream, max_steps=-1)

    def test_maps(self, tmp_path: Path) -> None:
        wrong = partial(strategies.explicit, pairs=[(1, 9)])
        self.refused(tmp_path, "also: .*layer 9 is out of", layers=partial(RACE, also=[wrong]))

    def test_sharding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        self.refused(tmp_path, "which FSDP would shard")

    def test_optimizers(self, tmp_path: Path) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        self.refused(tmp_path, "optimizer", optimizers=(optimizer, None))

    def test_maps_that_the_objectives_cannot_use(self, tmp_path: Path) -> None:
        objective = HiddenStates(layers=partial(RACE, also=[reverse]), blockwise=0.2)
        with pytest.raises(InputError, match=r"also: reverse: .* both ascending"):
            trainer(tmp_path, Logits(), objective, **named(tmp_path))


class TestDecided:
    @pytest.mark.usefixtures("ran")
    def test_the_map_that_wins(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, Logits(), HiddenStates(layers=RACE, weight=0.5), model=deep())
        found = made.run.objectives[1]
        assert isinstance(found, HiddenStates)
        assert isinstance(found.layers, LayerMap)
        assert found.layers.origin == "middle and last"
        assert found.weight == 0.5
        assert list(made.run.terms) == ["Logits", "HiddenStates"]
        assert made.run.told[-1].startswith("race: the hint is worth 3.0000 - 1.0000")

    def test_the_budget_is_kept(self, tmp_path: Path, ran: list[tuple[str, int]]) -> None:
        trainer(tmp_path, model=deep())
        assert sum(steps for _, steps in ran) <= 36
        assert Counter(name for name, _ in ran)["none"] == 3

    @pytest.mark.usefixtures("no_hint")
    def test_no_hint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        raced = HiddenStates(layers=RACE), AttentionMaps(layers=RACE)
        made = trainer(tmp_path, raced[0], Logits(), raced[1], max_steps=80)
        assert made.run.objectives == (Logits(),)
        assert list(made.run.terms) == ["Logits"]
        made.args.max_steps = 2
        made.train()
        told = capsys.readouterr().err
        assert "race: no hint is taken: KL 1.0000 without, KL 2.0000 with the best" in told
        facts = made.card_facts()
        assert [fact.name for fact in facts.objectives] == ["Logits"]
        assert not facts.layer_map

    @pytest.mark.usefixtures("ran")
    def test_a_hint_alone_has_no_bare_arm(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, HiddenStates(layers=RACE), model=deep())
        assert "none" not in "\n".join(made.run.told)

    @pytest.mark.usefixtures("brief")
    def test_users_callbacks_do_not_run(self, tmp_path: Path) -> None:
        callback = Counted()
        made = trainer(tmp_path, callbacks=[callback])
        assert callback.begun == 0
        made.args.max_steps = 1
        made.train()
        assert callback.begun == 1

    @pytest.mark.usefixtures("brief")
    def test_it_is_quiet(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        trainer(tmp_path, train_dataset=list(tiny.rows(32)))
        said = capfd.readouterr()
        assert said.out == ""
        assert "race" not in said.err


def told(made: DistillTrainer) -> list[str]:
    """What was decided, but for how much memory is free at the moment."""
    return [line for line in made.run.told if " free on cpu" not in line]


class TestKept:
    def start(self, folder: Path, **given: Any) -> DistillTrainer:
        return trainer(folder / "out", **{**named(folder), **given})

    def test_one_race_for_all_starts(self, tmp_path: Path, ran: list[tuple[str, int]]) -> None:
        first, count = self.start(tmp_path), len(ran)
        second = self.start(tmp_path)
        assert len(ran) == count > 0
        assert second.run.objectives == first.run.objectives
        assert told(second) == told(first)

    @pytest.mark.parametrize(
        "other", [{"seed": 1}, {"learning_rate": 1e-3}, {"balance": normalised}, {"max_steps": 50}]
    )
    def test_another_race_for_another_recipe(
        self, tmp_path: Path, ran: list[tuple[str, int]], other: dict[str, Any]
    ) -> None:
        self.start(tmp_path)
        count = len(ran)
        self.start(tmp_path, **other)
        assert len(ran) > count

    def test_a_damaged_file(self, tmp_path: Path, ran: list[tuple[str, int]]) -> None:
        first, count = self.start(tmp_path), len(ran)
        place = tmp_path / "out" / "race.json"
        place.write_text(place.read_text()[:200])
        assert self.start(tmp_path).run.objectives == first.run.objectives
        assert len(ran) == 2 * count
        assert told(self.start(tmp_path)) == told(first)
        assert len(ran) == 2 * count

    def test_loaded_models_race_again(self, tmp_path: Path, ran: list[tuple[str, int]]) -> None:
        trainer(tmp_path)
        count = len(ran)
        trainer(tmp_path)
        assert len(ran) == 2 * count
        assert not (tmp_path / "race.json").exists()

    @pytest.mark.usefixtures("brief")
    def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(self, tmp_path: Path) -> None:
        given = {"max_steps": 36, "save_strategy": "steps", "save_steps": 33}
        given |= {"optim": "adamw_torch", "learning_rate": 1e-3}
        straight = self.start(tmp_path, **given)
        straight.train()
        resumed = self.start(tmp_path, **given)
        assert told(resumed) == told(straight)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-33"))
        assert equal(weights(straight), weights(resumed))
