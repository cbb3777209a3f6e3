"""A gate on a hint: what it watches, when it closes, and that it lets go of hints that hurt."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from llm_distill import DistillTrainer, HiddenStates, Logits
from llm_distill import layers as layer_maps
from llm_distill.objectives.gate import BLOCK, CLOSING, ERRORS, SUMS, WARMUP, Gate, Watch
from llm_distill.objectives.states import HiddenStatesTerm
from llm_distill.schedules import step as two_stages
from tests import tiny


def squared(vector: Tensor) -> Tensor:
    return vector.square().sum()


class TestWatch:
    def test_it_splits_a_gradient_exactly(self) -> None:
        torch.manual_seed(0)
        x, hint, rest = (torch.randn(2, 3, 4) for _ in range(3))
        x.requires_grad_()
        state, observed = 2 * x, torch.zeros(SUMS)
        own = Watch(observed, 1).own(state, 1)
        ((own * hint).sum() + (state * rest).sum()).backward()
        expected = [(hint * rest).sum(), squared(hint), squared(rest), squared(rest)]
        assert torch.allclose(observed, torch.stack(expected))
        assert x.grad is not None
        assert torch.allclose(x.grad, 2 * (hint + rest))

    def test_below_the_highest_layer_the_rest_holds_what_the_hint_wants_above(self) -> None:
        torch.manual_seed(0)
        x, low, high, rest = (torch.randn(1, 2, 3) for _ in range(4))
        first = x.requires_grad_() * 1
        second = 3 * first
        observed = torch.zeros(SUMS)
        watch = Watch(observed, 2)
        own = watch.own(first, 1), watch.own(second, 2)
        ((own[0] * low).sum() + (own[1] * high).sum() + (second * rest).sum()).backward()
        below = 3 * (high + rest)
        expected = [
            (low * below).sum() + (high * rest).sum(),
            squared(low) + squared(high),
            squared(below) + squared(rest),
            squared(rest),
        ]
        assert torch.allclose(observed, torch.stack(expected))

    def test_a_layer_that_the_hint_does_not_reach_says_nothing(self) -> None:
        x = torch.ones(1, 1, 2, requires_grad=True)
        state, observed = 2 * x, torch.zeros(SUMS)
        Watch(observed, 1).own(state, 1)
        state.sum().backward()
        assert not observed.any()

    def test_a_state_without_a_gradient_stays_what_it_is(self) -> None:
        state = torch.ones(1, 1, 2)
        assert Watch(torch.zeros(SUMS), 1).own(state, 1) is state

    def test_nothing_is_read_by_the_host(self) -> None:
        x = torch.ones(1, 2, 3, device="meta", requires_grad=True)
        state, observed = 2 * x, torch.zeros(SUMS, device="meta")
        own = Watch(observed, 1).own(state, 1)
        (own.sum() + state.sum()).backward()


class Heard(Gate):
    """A gate that functions of torch can call."""

    def forward(self, observed: Tensor, progress: float) -> None:
        self.after_step(observed, progress)


def cosines(values: Tensor) -> Tensor:
    """Sums of steps with these cosines: `[..., 4]`."""
    return torch.stack([2 * values, *[torch.full_like(values, k) for k in (4.0, 1.0, 1.0)]], -1)


def closings(values: Tensor) -> Tensor:
    """At which progress the gates of many trainings close: `[seeds, steps] -> [seeds]`."""
    gate = Heard()
    seeds, steps = values.shape
    state = {name: b.expand(seeds, *b.shape).clone() for name, b in gate.named_buffers()}

    def heard(buffers: dict[str, Tensor], observed: Tensor, progress: float) -> Tensor:
        functional_call(gate, buffers, (observed, progress))
        return buffers["value"]

    for number, observed in enumerate(cosines(values).unbind(1), start=1):
        vmap(heard, in_dims=(0, 0, None))(state, observed, number / steps)
    return state["closed"]


def noise(kind: str, seeds: int, steps: int) -> Tensor:
    """Cosines of mean 0."""
    generator = torch.Generator().manual_seed(len(kind))
    drawn = torch.randn(seeds, steps, generator=generator)
    if kind == "skewed":
        return 0.1 * (1 + torch.rand(seeds, steps, generator=generator).log())
    if kind == "heavy":
        return (0.05 * drawn / torch.rand(seeds, steps, generator=generator).sqrt()).clamp(-1, 1)
    if kind == "correlated":
        values = [drawn[:, 0]]
        for new in drawn.unbind(1)[1:]:
            values.append(0.8 * values[-1] + 0.6 * new)
        drawn = torch.stack(values, 1)
    return (0.15 * drawn).clamp(-1, 1)


class TestGate:
    @pytest.mark.parametrize("steps", [200, 1000])
    @pytest.mark.parametrize("kind", ["normal", "skewed", "heavy", "correlated"])
    def test_it_does_not_close_on_noise(self, kind: str, steps: int) -> None:
        closed = closings(noise(kind, 2000, steps)).isfinite().float().mean()
        assert closed <= (0.025 if kind == "correlated" else 0.005)

    @pytest.mark.parametrize("mean", [-0.1, -0.3])
    def test_it_closes_on_what_is_against(self, mean: float) -> None:
        closed = closings(mean + noise("normal", 200, 400))
        assert closed.isfinite().all()
        assert closed.median() <= 1.5 * WARMUP * BLOCK / 400

    def test_it_stays_open_where_the_hint_helps(self) -> None:
        assert closings(0.1 + noise("normal", 200, 400)).isinf().all()

    def test_it_closes_at_the_first_block_whose_mean_is_far_enough_below_zero(self) -> None:
        torch.manual_seed(0)
        values = 0.2 * torch.randn(400).double() - 0.06
        gate = Gate().double()
        expected = None
        for number, value in enumerate(values, start=1):
            gate.after_step(cosines(value), number / 400)
            blocks = values[: number // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
            weights = 0.95 ** torch.arange(len(blocks) - 1, -1, -1).double()
            if expected is None and len(blocks) >= WARMUP:
                mean = (weights * blocks).sum() / weights.sum()
                effective = weights.sum().square() / weights.square().sum()
                spread = (weights * (blocks - mean).square()).sum() / weights.sum()
                if mean + ERRORS * (spread / (effective - 1)).sqrt() < 0:
                    expected = number / 400
        assert expected is not None
        assert 0.3 < expected < 1
        assert gate.closed == expected

    def test_no_gate_closes_before_its_warm_up(self) -> None:
        values = torch.full((1, 1000), -0.5)
        values[:, ::2] = -0.4
        assert closings(values)[0] == pytest.approx(WARMUP * BLOCK / 1000)

    def test_blocks_grow_with_the_training(self) -> None:
        gate = Gate()
        for number in range(1, 101):
            gate.after_step(cosines(torch.tensor(-0.5)), number / 4000)
        assert gate.blocks == 2

    def test_once_it_closes_the_factor_falls_to_zero_and_stays(self) -> None:
        gate = Gate()
        values = []
        for number in range(1, 501):
            cosine = -0.4 - 0.1 * (number % 2) if number <= 100 else 0.9
            gate.after_step(cosines(torch.tensor(cosine)), number / 500)
            values.append(float(gate.value))
        assert values[:100] == [1.0] * 100
        falling = values[99:150]
        assert falling == pytest.approx([1 - k / 500 / CLOSING for k in range(51)], abs=1e-5)
        assert values[150:] == [0.0] * 350

    def test_it_stays_closed_where_a_resumed_training_is_longer(self) -> None:
        """There its progress is less than it was when the gate closed."""
        gate = Gate()
        for number in range(1, 301):
            gate.after_step(cosines(torch.tensor(-0.4 - 0.1 * (number % 2))), number / 500)
        assert gate.value == 0.0
        for number in range(301, 401):
            gate.after_step(cosines(torch.tensor(0.9)), number / 5000)
            assert gate.value == 0.0

    def test_steps_without_a_hint_or_with_nothing_else_say_nothing(self) -> None:
        gate = Gate()
        silent = [
            torch.zeros(4),
            torch.tensor([-1.0, 0.0, 2.0, 2.0]),  # no hint
            torch.tensor([-1.0, 2.0, 2.0, 0.0]),  # at the highest layer nothing but the hint
            torch.tensor([torch.nan] * 4),
            torch.tensor([1.0, torch.inf, 1.0, 1.0]),
        ]
        for number in range(500):
            gate.after_step(silent[number % 5], (number + 1) / 500)
        assert gate.value == 1.0
        assert gate.blocks == 0.0
        assert gate.cosine.isnan()
        assert gate.report() == {}
        assert gate.steps == 500

    def test_gradients_too_small_for_their_product_are_heard(self) -> None:
        gate = Gate()
        for number in range(1, 2 * BLOCK + 1):
            gate.after_step(torch.tensor([-1e-28, 4e-28, 1e-28, 1e-28]), number / 20)
        assert gate.report() == {"cosine": pytest.approx(-0.5)}

    def test_it_is_resumed_to_the_bit(self) -> None:
        values = noise("normal", 1, 300)[0] - 0.08
        straight, first = Gate(), Gate()
        for number, value in enumerate(values, start=1):
            straight.after_step(cosines(value), number / 300)
            if number <= 117:
                first.after_step(cosines(value), number / 300)
        second = Gate()
        second.load_state_dict(first.state_dict())
        for number, value in enumerate(values[117:], start=118):
            second.after_step(cosines(value), number / 300)
        assert straight.closed < 1
        for name, buffer in straight.state_dict().items():
            assert torch.equal(buffer, second.state_dict()[name]), name

    def test_nothing_is_read_by_the_host(self) -> None:
        gate = Gate().to("meta")
        gate.after_step(torch.zeros(4, device="meta"), 0.5)
        assert gate.value.device.type == "meta"


def noisy() -> Any:
    """A model near `tiny.llama("student")`, which is the teacher here."""
    model = tiny.llama("student")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    return model


def trained(folder: Path, objectives: Any, **changes: Any) -> Any:
    """A near copy of its teacher after its training."""
    given = {"optim": "adamw_torch", "learning_rate": 3e-3, "logging_steps": 20, "max_steps": 200}
    args = tiny.arguments(folder, **given | {"per_device_train_batch_size": 4} | changes)
    trainer = DistillTrainer(
        noisy(), tiny.llama("student"), objectives, args, train_dataset=tiny.rows(longest=12)
    )
    trainer.train()
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class TestInATraining:
    HURTS = HiddenStates(layers=partial(layer_maps.explicit, pairs=[[2, 0]]), weight=3.0)
    """The last layer should be the embedding."""

    def test_a_hint_that_hurts_is_let_go_of(self, tmp_path: Path) -> None:
        trainer = trained(tmp_path, [Logits(), self.HURTS])
        weights = logged(trainer, "weight/HiddenStates")
        assert weights[0] == 3.0
        assert weights[-1] == 0.0
        assert weights == sorted(weights, reverse=True)
        term = trainer.run.terms["HiddenStates"]
        assert isinstance(term, HiddenStatesTerm)
        assert term.gate is not None
        assert term.gate.cosine < 0
        last = logged(trainer, "loss/Logits")
        assert last[-1] < 0.5 * last[4]

    def test_a_hint_that_helps_stays(self, tmp_path: Path) -> None:
        trainer = trained(
            tmp_path, [Logits(), HiddenStates(layers=layer_maps.uniform)], max_steps=120
        )
        assert logged(trainer, "weight/HiddenStates") == [1.0] * 6

    def test_without_a_gate_no_hint_is_let_go_of(self, tmp_path: Path) -> None:
        free = HiddenStates(layers=self.HURTS.layers, weight=3.0, gate=False)
        trainer = trained(tmp_path, [Logits(), free], max_steps=2)
        assert trainer.run.terms["HiddenStates"].factor() is None
        assert logged(trainer, "weight/HiddenStates") == []

    def test_a_stage_of_hints_alone_says_nothing(self, tmp_path: Path) -> None:
        later = partial(two_stages, before=0.0, after=1.0, at=0.5)
        hints = HiddenStates(layers=layer_maps.reverse)
        trainer = trained(tmp_path, [Logits(weight=later), hints], max_steps=40)
        gate = trainer.run.terms["HiddenStates"].gate
        assert gate.steps == 40
        assert gate.blocks == 2

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_it_watches_what_two_backward_passes_would_tell(
        self, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        student, teacher = tiny.llama("student"), tiny.llama("teacher")
        args = tiny.arguments(
            tmp_path,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            gradient_checkpointing=checkpointing,
        )
        hints = HiddenStates(layers=layer_maps.uniform, weight=0.7)
        trainer = DistillTrainer(
            student, teacher, [Logits(), hints], args, train_dataset=tiny.rows(6)
        )
        told: list[Tensor] = []
        calls: list[Any] = []
        monkeypatch.setattr(Gate, "after_step", lambda _, seen, __: told.append(seen.clone()))
        forward = trainer.distiller.forward

        def noting(*given: Any) -> Any:
            calls.append(given)
            return forward(*given)

        monkeypatch.setattr(trainer.distiller, "forward", noting)
        trainer.train()
        assert len(calls) == 3
        expected = sum(self._twice(copy.deepcopy(trainer.distiller), *call) for call in calls)
        assert torch.allclose(told[0], torch.as_tensor(expected), rtol=1e-4)

    @staticmethod
    def _twice(distiller: Any, batch: Any, teacher: Any, step: Any) -> Tensor:
        """The sums of one micro-batch from one backward for the hint and one for everything."""
        logits, term = distiller.terms
        distiller.student.activation_checkpointing_disable()
        term.observed = None
        signals = distiller._reader.read(batch)
        states = [signals.states[1], signals.states[2]]
        hint = step.shares[1] * term(signals, teacher, batch, step)
        direct = torch.autograd.grad(hint, states, retain_graph=True)
        whole, _ = distiller._head([0], signals, teacher, batch, step)
        below = torch.autograd.grad(whole + hint, states)
        alone = copy.copy(signals)
        detached = {k: state.detach().requires_grad_() for k, state in signals.states.items()}
        object.__setattr__(alone, "states", detached)
        own = torch.autograd.grad(
            step.shares[1] * term(alone, teacher, batch, step), list(detached.values())
        )
        assert torch.allclose(direct[1], own[1], rtol=1e-4, atol=1e-7)
        rest = [total - mine for total, mine in zip(below, own, strict=True)]
        product = sum((a * b).sum() for a, b in zip(own, rest, strict=True))
        lengths = [sum(squared(x) for x in side) for side in (own, rest)]
        del logits
        return torch.stack([torch.as_tensor(x) for x in (product, *lengths, squared(rest[1]))])
