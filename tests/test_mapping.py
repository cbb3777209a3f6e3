"""From strategies to maps: what is known at once, what data say, and whole trainings with each."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from llm_distill import CrossEntropy, DistillTrainer, HiddenStates, Logits, schedules
from llm_distill import layers as layer_maps
from llm_distill.errors import InputError
from llm_distill.layers import LayerEvidence, LayerMap, Similarity
from llm_distill.mapping import FADED, fading, known, requests, settled, undecided, with_rows
from llm_distill.objectives.contrastive import Contrastive
from llm_distill.objectives.relations import Relations
from llm_distill.objectives.states import HiddenStatesTerm
from llm_distill.signals import Request
from llm_distill.students import FromConfig
from tests import tiny
from tests.objectives.planted import STUDENT, TEACHER

SPECS = STUDENT, TEACHER
CUT = replace(STUDENT, blocks=(1, 3))
OURS, EVERY = Request(hidden=frozenset(range(3))), Request(hidden=frozenset(range(5)))


def hints(layers: Any, **settings: Any) -> HiddenStates:
    return HiddenStates(layers=layers, **settings)


def alike(values: list[list[float]]) -> Similarity:
    return Similarity(torch.tensor(values), torch.full((len(values), len(values[0])), 0.001))


BLOCKS = alike(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.8, 0.9, 0.0],
        [0.0, 0.8, 1.0, 0.9, 0.0],
        [0.0, 0.9, 0.9, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
)
"""The teacher's blocks 1 to 3 are one segment, which 3 stands for best, block 4 another."""


class TestUndecided:
    def test_it_is_what_any_objective_asks_for(self) -> None:
        assert undecided([Logits(), hints(layer_maps.uniform)]) == frozenset()
        both = [hints(layer_maps.auto_race), hints(layer_maps.cka), Relations()]
        assert undecided(both) == {"race", "cross", "similarity"}


class TestRequests:
    @pytest.mark.parametrize(
        ("strategies", "expected"),
        [
            ([layer_maps.uniform], (Request(), Request())),
            ([layer_maps.provenance], (Request(), Request())),
            ([layer_maps.auto], (Request(), EVERY)),
            ([layer_maps.auto_race], (Request(), EVERY | Request(logits=True))),
            ([layer_maps.transport], (OURS, EVERY)),
            ([layer_maps.auto, layer_maps.cka], (OURS, EVERY)),
            ([layer_maps.auto_race, layer_maps.cka], (OURS, EVERY | Request(logits=True))),
        ],
    )
    def test_they_are_the_states_to_compare(self, strategies: Any, expected: Any) -> None:
        assert requests([hints(s) for s in strategies], *SPECS) == expected


class TestKnown:
    def test_provenance_is_known_from_the_config(self) -> None:
        decided, other = known([hints(layer_maps.provenance), Logits()], CUT, TEACHER)
        assert cast("HiddenStates", decided).mapping(CUT, TEACHER).pairs == ((1, 2), (2, 4))
        assert other == Logits()

    def test_a_student_that_was_not_cut_has_none(self) -> None:
        with pytest.raises(
            InputError, match="HiddenStates: layers: provenance goes by the teacher"
        ):
            known([hints(layer_maps.provenance)], *SPECS)

    def test_what_data_decide_waits(self) -> None:
        objectives = [hints(layer_maps.auto), hints(layer_maps.auto_race)]
        assert known(objectives, *SPECS) == tuple(objectives)


class TestSettled:
    def test_the_evidence_decides(self) -> None:
        objectives = [hints(layer_maps.auto), hints(layer_maps.last), Logits()]
        auto, last, logits = settled(objectives, *SPECS, LayerEvidence(similarity=BLOCKS))
        found = cast("HiddenStates", auto).layers
        assert isinstance(found, LayerMap)
        assert found.pairs == ((1, 3), (2, 4))
        assert found.origin.startswith("auto")
        assert (last, logits) == tuple(objectives[1:])

    def test_a_race_waits(self) -> None:
        objectives = (hints(layer_maps.auto_race),)
        assert settled(objectives, *SPECS, LayerEvidence(similarity=BLOCKS)) == objectives

    def test_without_enough_data_auto_is_uniform_and_says_so(self) -> None:
        (found,) = settled([hints(layer_maps.auto)], *SPECS, LayerEvidence())
        mapping = cast("HiddenStates", found).mapping(*SPECS)
        assert mapping.pairs == ((1, 2), (2, 4))
        assert (
            str(mapping)
            .splitlines()[0]
            .endswith("too few training data to compare layers, so uniform")
        )

    @pytest.mark.parametrize("strategy", [layer_maps.segmentation, layer_maps.transport])
    def test_what_was_asked_for_by_name_is_not_replaced(self, strategy: Any) -> None:
        with pytest.raises(InputError, match=r"HiddenStates: layers: .* that was not measured"):
            settled([hints(strategy)], *SPECS, LayerEvidence())


class TestFading:
    FRESH = replace(STUDENT, fresh=True)

    def test_hints_of_a_random_student_end_before_the_training(self) -> None:
        objectives = [hints(layer_maps.last, weight=2.0), Relations(weight=0.5), Logits(weight=3.0)]
        faded = fading(objectives, self.FRESH)
        for objective, weight in zip(faded[:2], (2.0, 0.5), strict=True):
            at = [schedules.at(objective.weight, p) for p in (0.0, FADED / 2, FADED, 1.0)]
            assert at == pytest.approx([weight, weight / 2, 0.0, 0.0])
        assert faded[2] is objectives[2]

    def test_hints_are_not_gone_while_nothing_else_is_trained(self) -> None:
        """Steps between 60 % and the end of the blocks' own stage would train nothing."""
        (faded,) = fading([hints(layer_maps.uniform, blockwise=0.8)], self.FRESH)
        at = [schedules.at(faded.weight, p) for p in (0.0, 0.4, 0.79, 0.8, 1.0)]
        assert at == pytest.approx([1.0, 0.5, 0.0125, 0.0, 0.0])

    def test_a_schedule_is_taken_as_it_is_written(self) -> None:
        objective = hints(layer_maps.last, weight=partial(schedules.constant, value=1.0))
        assert fading([objective], self.FRESH) == (objective,)

    def test_other_students_keep_theirs(self) -> None:
        objectives = (hints(layer_maps.last), Contrastive())
        assert fading(objectives, STUDENT) == objectives


def trainer(folder: Path, layers: Any, *, student: Any = None, **changes: Any) -> DistillTrainer:
    """Two blocks from four, with a map."""
    # Random projectors have something to learn; fitted ones start where the loss is least.
    objectives = [CrossEntropy(weight=0.1), Logits(), hints(layers, init="random")]
    given = {"optim": "adamw_torch", "learning_rate": 3e-3, "save_steps": 6, "max_steps": 12}
    args = tiny.arguments(folder, **given | {"save_strategy": "steps"} | changes)
    student = tiny.llama("student") if student is None else student
    return DistillTrainer(
        student, tiny.llama("teacher"), objectives, args, train_dataset=tiny.rows(32)
    )


def term_of(built: DistillTrainer) -> HiddenStatesTerm:
    term = built.run.terms["HiddenStates"]
    assert isinstance(term, HiddenStatesTerm)
    return term


def resumed(folder: Path, layers: Any, **changes: Any) -> DistillTrainer:
    built = trainer(folder, layers, **changes)
    built.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    return built


def same_weights(one: DistillTrainer, other: DistillTrainer) -> bool:
    a, b = (t.distiller.state_dict() for t in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestInATraining:
    def test_auto_is_shown_trains_and_is_resumed(self, tmp_path: Path, capsys: Any) -> None:
        straight = trainer(tmp_path, layer_maps.auto)
        mapping = term_of(straight).mapping
        straight.train()
        shown = capsys.readouterr().err
        for line in str(mapping).splitlines():
            assert line in shown
        assert mapping.origin.startswith("auto")
        assert any("nearer target" in name for name, _ in mapping.evidence)
        assert mapping.pairs[-1] == (2, 4)
        logs = [e["loss/HiddenStates"] for e in straight.state.log_history if "loss" in e]
        assert logs[-1] < logs[0]
        again = resumed(tmp_path, layer_maps.auto)
        assert term_of(again).mapping == mapping
        assert same_weights(straight, again)

    def test_too_few_data_are_said(self, tmp_path: Path, capsys: Any) -> None:
        built = DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            [Logits(), HiddenStates()],
            tiny.arguments(tmp_path, max_steps=1),
            train_dataset=tiny.rows(2),
        )
        built.train()
        shown = " ".join(capsys.readouterr().err.split())
        assert "auto: too few training data to compare layers, so uniform" in shown

    def test_hints_of_a_random_student_fade(self, tmp_path: Path) -> None:
        fresh = FromConfig("llama", {"hidden_size": 32, "num_hidden_layers": 2} | HEADS)
        built = trainer(tmp_path, layer_maps.auto, student=fresh, max_steps=10, save_strategy="no")
        built.train()
        weights = [e["weight/HiddenStates"] for e in built.state.log_history if "loss" in e]
        expected = [max(0.0, 1 - k / 10 / FADED) for k in range(10)]
        assert weights == pytest.approx(expected, abs=1e-6)

    def test_random_draws_a_map_for_each_epoch_also_after_a_resumption(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        own = HiddenStatesTerm._mapping

        def noting(term: HiddenStatesTerm, batch: Any) -> LayerMap:
            seen.append(own(term, batch).pairs)
            return own(term, batch)

        monkeypatch.setattr(HiddenStatesTerm, "_mapping", noting)
        strategy = partial(layer_maps.random, seed=3)
        straight = trainer(tmp_path, strategy)
        straight.train()
        expected = [strategy(2, 4, epoch=step // 4).pairs for step in range(12)]
        assert seen == expected
        assert len(set(expected)) > 1
        seen.clear()
        again = resumed(tmp_path, strategy)
        assert seen == expected[6:]
        assert same_weights(straight, again)

    def test_learned_shares_train_stay_near_and_are_saved(self, tmp_path: Path) -> None:
        strategy = partial(layer_maps.learned, width=0.3)
        straight = trainer(tmp_path, strategy)
        start = [shares.detach().clone() for shares in term_of(straight).shares]
        straight.train()
        for before, after in zip(start, term_of(straight).shares, strict=True):
            assert not torch.equal(before, after)
            assert divergence(after, before) < 0.05
        assert same_weights(straight, resumed(tmp_path, strategy))

    @pytest.mark.parametrize("strategy", [layer_maps.transport, layer_maps.cka])
    def test_maps_that_compare_both_models_train(self, strategy: Any, tmp_path: Path) -> None:
        straight = trainer(tmp_path, strategy)
        mapping = term_of(straight).mapping
        if strategy is layer_maps.transport:
            assert any(len(row.teacher) > 1 for row in mapping.rows)
        straight.train()
        logs = [e["loss/HiddenStates"] for e in straight.state.log_history if "loss" in e]
        assert logs[-1] < logs[0]
        again = resumed(tmp_path, strategy)
        assert term_of(again).mapping == mapping
        assert same_weights(straight, again)


HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def divergence(after: Tensor, before: Tensor) -> float:
    """Of shares from where they started, nats."""
    now, start = after.log_softmax(0), before.log_softmax(0)
    return (now.exp() * (now - start)).sum().item()


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (partial(layer_maps.auto, most=0), "most"),
        (partial(layer_maps.transport, epsilon=0.0), "epsilon"),
        (partial(layer_maps.cka, prior=-1.0), "prior"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_there_are_data(
    strategy: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        known([hints(strategy)], *SPECS)


def test_masked_models_are_hinted_at_every_token() -> None:
    """Unless somebody says otherwise; objectives without such a choice stay as they are."""
    given = [HiddenStates(), HiddenStates(rows="supervised", name="said"), Logits()]
    causal, masked = with_rows(given, STUDENT), with_rows(given, replace(STUDENT, masked=True))
    assert [o.rows for o in causal if isinstance(o, HiddenStates)] == ["supervised", "supervised"]
    assert [o.rows for o in masked if isinstance(o, HiddenStates)] == ["valid", "supervised"]
    assert causal[2] is masked[2] is given[2]


def test_a_masked_run_counts_every_token(tmp_path: Path) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    row = {"input_ids": ids, "labels": [-100, 6, -100, -100, 9, -100]}
    trainer = DistillTrainer(
        tiny.bert(depth=2),
        tiny.bert(),
        [Logits(), HiddenStates(layers=layer_maps.last)],
        tiny.arguments(tmp_path),
        train_dataset=[row] * 8,
    )
    assert [term.rows for term in trainer.run.terms.values()] == ["supervised", "valid"]
