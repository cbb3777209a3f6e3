"""Blocks that learn alone."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from llm_distill import DistillTrainer, HiddenStates, Logits
from llm_distill.distiller import Distiller
from llm_distill.errors import InputError
from llm_distill.layers import LayerMap, Row, explicit, last, uniform
from llm_distill.objectives.blockwise import Blockwise, rms
from llm_distill.objectives.states import HiddenStatesTerm
from llm_distill.rows import Step
from llm_distill.schedules import linear, step
from llm_distill.signals import Request
from tests import tiny
from tests.objectives.compare import batch, read, specs

ALONE = Step(0.0, torch.ones(1), alone=True)


def outcome(student: PreTrainedModel, teacher: PreTrainedModel, layers: Any) -> Tensor:
    """The loss of one batch in which blocks learn alone."""
    objective = HiddenStates(layers=layers, blockwise=0.5, gate=False)
    torch.manual_seed(0)
    term = objective.build(*specs(student, teacher))
    distiller = Distiller(student, {"HiddenStates": term}, "student")
    given = batch()
    with torch.no_grad():
        theirs = read(teacher, term.teacher, given)
    result = distiller(given, theirs, ALONE)
    distiller.release()
    return cast("Tensor", result.loss)


class TestBlockwise:
    def test_where_segments_begin(self) -> None:
        found = Blockwise(LayerMap.of([(1, 3), (2, 5), (4, 8)], 4, 8, "x"), 16, 16)
        assert found.teacher_layers == {0, 3, 5}
        states = {k: torch.full((1, 2, 16), float(k)) for k in (0, 3, 5)}
        teacher = read(tiny.llama("teacher"), Request(hidden=frozenset({0})), batch())
        object.__setattr__(teacher, "states", states)
        assert {b: float(s[0, 0, 0]) for b, s in found.inputs(teacher).items()} == {
            1: 0.0,
            2: 3.0,
            3: 5.0,
        }
        assert [type(entry) for entry in found.entries] == [nn.Identity] * 3

    def test_other_widths_have_an_affine_map_into_each_segment(self) -> None:
        found = Blockwise(uniform(2, 4), 16, 32)
        shapes = [tuple(cast("Tensor", entry.weight).shape) for entry in found.entries]
        assert shapes == [(16, 32)] * 2

    @pytest.mark.parametrize(
        "mapping",
        [
            LayerMap.of([(1, 4), (2, 2)], 2, 4, "descending"),
            LayerMap.of([(0, 0), (2, 4)], 2, 4, "embedding"),
            LayerMap.of([(2, 2), (2, 4)], 2, 4, "twice"),
            LayerMap((Row(2, ((2, 0.5), (4, 0.5))),), 2, 4, "soft"),
        ],
    )
    def test_maps_without_segments_are_refused(self, mapping: LayerMap) -> None:
        with pytest.raises(ValueError, match="blockwise needs a map with one teacher layer"):
            Blockwise(mapping, 16, 16)

    def test_rms(self) -> None:
        assert rms(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).item() == pytest.approx(12.5**0.5)


class TestAlone:
    def test_a_copy_of_the_teacher_has_nothing_to_learn(self) -> None:
        for layers in (uniform, last, partial(explicit, pairs=[[2, 2], [4, 4]])):
            loss = outcome(tiny.llama("teacher"), tiny.llama("teacher"), layers)
            assert loss.item() < 1e-2 * len(batch().supervised)
            assert loss.item() / len(batch().supervised) < 1e-5

    def test_gradients_stay_in_their_segment(self) -> None:
        """Changing block 1 changes nothing of what block 2 is told."""

        def grads(scale: float) -> list[Tensor]:
            student, teacher = tiny.llama("student"), tiny.llama("teacher")
            with torch.no_grad():
                for parameter in student.model.layers[0].parameters():
                    parameter.mul_(scale)
            outcome(student, teacher, uniform).backward()
            blocks = student.model.layers
            return [
                torch.cat([cast("Tensor", p.grad).flatten() for p in b.parameters()])
                for b in blocks
            ]

        one, other = grads(1.0), grads(1.5)
        assert torch.equal(one[1], other[1])
        assert not torch.allclose(one[0], other[0])

    def test_a_segment_of_several_blocks_runs_through(self) -> None:
        student, teacher = tiny.llama("student"), tiny.llama("teacher")
        outcome(student, teacher, last).backward()
        assert all(p.grad is not None and p.grad.any() for p in student.model.layers.parameters())
        assert student.get_input_embeddings().weight.grad is None

    def test_two_starts_are_refused(self) -> None:
        spec = specs(tiny.llama("student"), tiny.llama("teacher"))
        terms = {n: HiddenStates(blockwise=0.5, layers=uniform).build(*spec) for n in ("a", "b")}
        with pytest.raises(InputError, match="a and b both let blocks learn alone"):
            Distiller(tiny.llama("student"), terms, "student")

    @pytest.mark.parametrize(
        ("weight", "place"),
        [(0.0, "0%"), (partial(linear, start=1.0, end=0.0, until=0.3), "30%")],
    )
    def test_steps_that_would_train_nothing_are_refused(self, weight: Any, place: str) -> None:
        spec = specs(tiny.llama("student"), tiny.llama("teacher"))
        with pytest.raises(ValueError, match=f"weight is 0 at {place}; write a weight > 0"):
            HiddenStates(blockwise=0.5, layers=uniform, weight=weight).build(*spec)

    def test_a_hint_may_end_with_them(self) -> None:
        spec = specs(tiny.llama("student"), tiny.llama("teacher"))
        weight = partial(step, before=1.0, after=0.0, at=0.5)
        term = HiddenStates(blockwise=0.5, layers=uniform, weight=weight).build(*spec)
        assert term.alone(0.49)
        assert not term.alone(0.5)

    @pytest.mark.parametrize("share", [-0.1, 1.0])
    def test_shares_out_of_range_are_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match=r"blockwise is .*; write a share"):
            HiddenStates(blockwise=share)


def test_first_blocks_then_everything(tmp_path: Path) -> None:
    """Until the share is over, nothing but the blocks is trained or logged."""
    trainer = DistillTrainer(
        tiny.llama("student"),
        tiny.llama("teacher"),
        [Logits(), HiddenStates(layers=uniform, blockwise=0.5)],
        tiny.arguments(tmp_path, max_steps=4),
        train_dataset=tiny.rows(32),
    )
    head = cast("Any", trainer.student).get_output_embeddings().weight.detach().clone()
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs
            seen.append(
                torch.equal(cast("Any", trainer.student).get_output_embeddings().weight, head)
            )

    trainer.add_callback(Look())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["loss/Logits" in log for log in logs] == [False, False, True, True]
    assert ["kl" in log for log in logs] == [False, False, True, True]
    assert all("loss/HiddenStates" in log for log in logs)
    assert seen == [True, True, False, False]
    assert isinstance(trainer.distiller.terms[1], HiddenStatesTerm)
