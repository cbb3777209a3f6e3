"""Layer maps that follow the student while it trains: when they move, and what comes of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from llm_distill import (
    AttentionMaps,
    Contrastive,
    DistillTrainer,
    HiddenStates,
    Logits,
    Relations,
    heads,
    surveying,
)
from llm_distill import layers as layer_maps
from llm_distill.errors import InputError
from llm_distill.layers import LayerEvidence, LayerMap, Similarity, auto_race
from llm_distill.objectives import Objective
from tests import tiny

FOLLOWS = partial(layer_maps.cka, prior=0.0, refresh=2)


def like(first: int, *, error: float = 0.001, second: float = 0.2) -> LayerEvidence:
    """The student's first layer is like one of the teacher's, its second like the last.

    Args:
        first: Which one.
        error: Of every similarity.
        second: How much the first layer is like the teacher's second.
    """
    cross = torch.full((3, 5), 0.2)
    cross[1, 2] = second
    cross[1, first], cross[2, 4] = 0.9, 0.9
    errors = torch.full_like(cross, error)
    alike = Similarity(torch.ones(5, 5), torch.zeros(5, 5))
    return LayerEvidence(similarity=alike, cross=Similarity(cross, errors))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[bool]]:
    """Evidence at calibration and at looks, made up; returns whether each was read to be kept."""

    def plant(first: LayerEvidence, later: LayerEvidence) -> list[bool]:
        seen: list[bool] = []

        def survey(*args: Any, kept: bool = True, member: int | None = None) -> LayerEvidence:
            del args, member
            seen.append(kept)
            return first if kept else later

        monkeypatch.setattr(surveying, "survey", survey)
        return seen

    return plant


def trainer(folder: Path, *objectives: Objective, **changes: Any) -> DistillTrainer:
    args = tiny.arguments(folder, **{"max_steps": 20, "warmup_steps": 2} | changes)
    models = tiny.llama("student"), tiny.llama("teacher")
    held_out = tiny.rows(8)
    return DistillTrainer(
        *models, objectives, args, train_dataset=tiny.rows(32), eval_dataset=held_out
    )


def pairs(made: DistillTrainer, name: str = "HiddenStates") -> Any:
    mapping = made.run.terms[name].mapping
    assert isinstance(mapping, LayerMap)
    return mapping.pairs


class TestLooks:
    def test_between_warm_up_and_a_third_of_the_steps(
        self, tmp_path: Path, shown: Callable[..., list[bool]]
    ) -> None:
        """20 steps, 2 of warm-up: of the even ones only 4 and 6 are looked at."""
        seen = shown(like(2), like(2))
        made = trainer(tmp_path, Logits(), HiddenStates(layers=FOLLOWS))
        made.train()
        assert seen == [True, False, False]
        assert pairs(made) == ((1, 2), (2, 4))

    def test_a_map_moves_and_says_so(
        self,
        tmp_path: Path,
        shown: Callable[..., list[bool]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        shown(like(2), like(3))
        made = trainer(tmp_path, Logits(), HiddenStates(layers=FOLLOWS))
        assert pairs(made) == ((1, 2), (2, 4))
        made.announces = False  # as under `llm-distill run`, which knows nothing of looks
        made.train()
        assert pairs(made) == ((1, 3), (2, 4))
        told = capsys.readouterr().err
        assert "step 4: HiddenStates moves its map" in told
        assert "gain in mean similarity at the last move: 0.35" in told
        assert "step 6" not in told  # the same map again
        card = str(made.card_facts().layer_map)
        assert "1 | 3 of 4" in card
        assert "projector 1 -> 2" not in card  # what it was fitted to

    def test_a_map_stays_and_says_why(
        self,
        tmp_path: Path,
        shown: Callable[..., list[bool]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        shown(like(2), like(3, error=0.02, second=0.88))
        made = trainer(tmp_path, Logits(), HiddenStates(layers=FOLLOWS))
        made.train()
        assert pairs(made) == ((1, 2), (2, 4))
        told = capsys.readouterr().err
        assert "step 4: HiddenStates keeps its map; of 1->3 2->4: it gains 0.01, and two" in told

    @pytest.mark.parametrize(
        "objective",
        [
            HiddenStates(layers=FOLLOWS),
            AttentionMaps(layers=FOLLOWS),
            Relations(layers=FOLLOWS),
            Contrastive(layers=FOLLOWS),
        ],
    )
    def test_from_the_move_on_it_is_a_training_on_the_other_map(
        self, tmp_path: Path, shown: Callable[..., list[bool]], objective: Any
    ) -> None:
        """A loss after the move, against that of an objective on the new map from the start."""
        shown(like(2), like(3))
        moved = trainer(tmp_path / "moved", objective, max_steps=20)
        name = type(objective).__name__
        moved.train()
        term = moved.run.terms[name]
        there = {1: 3, 2: 4}
        wanted = frozenset(there.values())
        assert term.teacher.hidden in (frozenset(), wanted)
        assert term.teacher.heads in (frozenset(), wanted)
        fixed = layer_maps.explicit(2, 4, pairs=list(there.items()))
        other = trainer(tmp_path / "fixed", objective.with_map(fixed), max_steps=20)
        other.student.load_state_dict(moved.student.state_dict())
        other.run.terms[name].load_state_dict(term.state_dict())
        batch = cast("Any", other).data_collator([dict(row) for row in tiny.rows(8)])
        losses = [
            float(each.compute_loss(each.model, dict(batch)).detach())  # type: ignore[arg-type]  # Trainer's is optional
            for each in (moved, other)
        ]
        assert losses[0] == losses[1] > 0

    def test_looking_changes_nothing_else(self, tmp_path: Path) -> None:
        """Nothing is made up here: the student is measured, its map stays, as do random numbers."""
        every = []
        strategies: list[Any] = [partial(layer_maps.transport, refresh=2), layer_maps.transport]
        for place, layers in enumerate(strategies):
            made = trainer(tmp_path / str(place), Logits(), HiddenStates(layers=layers))
            for module in cast("Any", made.student).modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.1
            made.train()
            every.append((made.run.terms["HiddenStates"].mapping, made.student.state_dict()))
        (looked, ours), (still, theirs) = every
        assert looked == still
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    @pytest.mark.parametrize("changes", [{"max_steps": 5}, {"warmup_steps": 0.5}])
    def test_looks_that_never_come_are_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
    ) -> None:
        made = trainer(tmp_path, Logits(), HiddenStates(layers=FOLLOWS), **changes)
        made.train()
        steps = changes.get("max_steps", 20)
        told = " ".join(capsys.readouterr().err.split())
        assert f"refresh 2 never looks: between warm-up and 30% of {steps} steps" in told


class First(TrainerCallback):
    """Of all evaluations the first one is the best."""

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        del args, control, kwargs
        metrics["eval_first"] = -float(state.global_step)


class TestCheckpoints:
    @pytest.mark.parametrize("kind", [HiddenStates, AttentionMaps, Relations])
    def test_resumed_after_a_move_equals_straight(
        self,
        tmp_path: Path,
        shown: Callable[..., list[bool]],
        capsys: pytest.CaptureFixture[str],
        kind: Any,
    ) -> None:
        """Terms without a projector have nothing in a checkpoint but their map."""
        shown(like(2), like(3))
        given, name = {"save_strategy": "steps", "save_steps": 5}, kind.__name__
        straight = trainer(tmp_path, Logits(), kind(layers=FOLLOWS), **given)
        straight.train()
        resumed = trainer(tmp_path, Logits(), kind(layers=FOLLOWS), **given)
        assert pairs(resumed, name) == ((1, 2), (2, 4))
        capsys.readouterr()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert pairs(resumed, name) == ((1, 3), (2, 4))
        assert f"{name}: the map of the checkpoint" in capsys.readouterr().err
        ours, theirs = (made.distiller.state_dict() for made in (straight, resumed))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_the_best_model_has_the_map_of_its_time(
        self, tmp_path: Path, shown: Callable[..., list[bool]]
    ) -> None:
        shown(like(2), like(3))
        args = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        save = {"save_strategy": "steps", "save_steps": 2}
        first = {"metric_for_best_model": "eval_first", "greater_is_better": True}
        made = trainer(tmp_path, Logits(), HiddenStates(layers=FOLLOWS), **args | save | first)
        made.add_callback(First())
        made.train()
        assert str(made.state.best_model_checkpoint).endswith("checkpoint-2")
        assert pairs(made) == ((1, 2), (2, 4))
        assert made.evaluate()["eval_loss/HiddenStates"] > 0  # the teacher still gives what is read


class TestRefusals:
    def test_a_sharded_student(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        with pytest.raises(InputError, match=r"refresh reads the whole student .* FSDP keeps"):
            trainer(tmp_path, Logits(), HiddenStates(layers=FOLLOWS))

    @pytest.mark.parametrize(
        "objectives",
        [
            [HiddenStates(layers=partial(auto_race, also=(FOLLOWS,), share=0.9))],
            [HiddenStates(layers=partial(auto_race, share=0.9)), Relations(layers=FOLLOWS)],
        ],
    )
    def test_a_race(self, tmp_path: Path, objectives: list[Objective]) -> None:
        with pytest.raises(InputError, match="refresh: auto_race decides once"):
            trainer(tmp_path, Logits(), *objectives, max_steps=300)

    def test_a_checkpoint_of_other_rows(self, tmp_path: Path) -> None:
        given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
        trainer(tmp_path, Logits(), HiddenStates(layers=layer_maps.last), **given).train()
        other = trainer(
            tmp_path, Logits(), HiddenStates(layers=FOLLOWS), **given | {"max_steps": 9}
        )
        with pytest.raises(InputError, match="with other layer maps, 2->4; this run has"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))

    def test_a_strategy_that_is_told_what_the_student_is_like(self, tmp_path: Path) -> None:
        told = like(2)
        layers = partial(FOLLOWS, cross=told.cross, similarity=told.similarity)
        with pytest.raises(InputError, match="refresh looks at the student, and this strategy is"):
            trainer(tmp_path, Logits(), HiddenStates(layers=layers))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: HiddenStates(layers=FOLLOWS, blockwise=0.2), "write refresh: 0, or blockwise"),
            (lambda: AttentionMaps(layers=FOLLOWS, heads=heads.match), "cka: leave refresh out"),
            (lambda: Contrastive(layers=FOLLOWS, queue=8), "write queue: 0, or layers that stay"),
            (
                lambda: HiddenStates(layers=partial(layer_maps.cka, refresh=-1)),
                "has refresh -1; write the steps",
            ),
        ],
    )
    def test_what_belongs_to_one_map(
        self, tmp_path: Path, make: Callable[[], Objective], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, Logits(), make())
