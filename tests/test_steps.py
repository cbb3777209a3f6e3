"""What a step is made of: items, silent batches, and rehearsals for a balance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    HiddenStates,
    Logits,
    layers,
)
from llm_distill.balance import Balance, gradient, normalised, uncertainty
from llm_distill.errors import InputError
from llm_distill.objectives import Evidence, Objective, Term
from llm_distill.rows import Batch, Step
from llm_distill.schedules import linear
from llm_distill.signals import ModelSpec, Request, Signals
from tests import tiny

HINT = HiddenStates(layers=partial(layers.explicit, pairs=[[1, 2]]), weight=0.5, init="random")
WANTED = (CrossEntropy(weight=0.1), Logits(temperature=2.0), HINT)
EVERY = [normalised, uncertainty, partial(gradient, every=2)]


def build(folder: Path, balance: Any, wanted: Any = WANTED, **changes: Any) -> DistillTrainer:
    """A trainer on tiny models; `student`, `eval_dataset` and `peft_config`, else arguments."""
    given = {k: changes.pop(k) for k in ("eval_dataset", "peft_config") if k in changes}
    rows = changes.pop("train_dataset", None) or tiny.rows()
    student = changes.pop("student", None) or tiny.llama("student")
    trainer = DistillTrainer(
        student,
        changes.pop("teacher", None) or tiny.llama("teacher"),
        wanted,
        tiny.arguments(folder, **changes),
        balance=balance,
        train_dataset=rows,
        **given,
    )
    trainer.announces = False
    return trainer


def logs(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def weights(trainer: DistillTrainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.student.state_dict().items()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Noting(Balance):
    """Measures at a layer, or without one, and keeps what it hears."""

    moves = True

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer = layer
        self.heard: list[tuple[Tensor, Tensor]] = []

    def asks(self, done: int) -> bool:
        return done in (0, 2)

    def measured(self, values: Tensor, squares: Tensor) -> None:
        self.heard.append((values.clone(), squares.clone()))


def noting(terms: Mapping[str, Term], depth: int, *, layer: int | None) -> Balance:
    del terms, depth
    return Noting(layer)


class TestRehearsal:
    @pytest.mark.parametrize("layer", [None, 1])
    def test_the_values_are_those_of_the_step_that_follows(
        self, tmp_path: Path, layer: int | None
    ) -> None:
        trainer = build(tmp_path, partial(noting, layer=layer))
        trainer.train()
        balance: Any = trainer.distiller.balance
        names = ["loss/CrossEntropy", "loss/Logits", "loss/HiddenStates"]
        for (values, _), log in zip(
            balance.heard, (logs(trainer)[0], logs(trainer)[2]), strict=True
        ):
            assert values.tolist() == pytest.approx([log[name] for name in names], rel=1e-5)

    @pytest.mark.parametrize("layer", [None, 0])
    def test_it_leaves_the_training_as_it_is(self, tmp_path: Path, layer: int | None) -> None:
        """Random numbers, gradients and all: dropout would tell."""
        results = []
        for balance in (None, partial(noting, layer=layer)):
            student = tiny.llama("student")
            for block in student.model.layers:
                block.self_attn.attention_dropout = 0.3
            trainer = build(tmp_path, balance, student=student)
            trainer.train()
            results.append(weights(trainer))
        assert furthest(*results) == 0.0

    @pytest.mark.parametrize("split", [(8, 1), (1, 8), (3, 3)])
    def test_gradients_are_those_of_the_whole_step(
        self, tmp_path: Path, split: tuple[int, int]
    ) -> None:
        """Against plain autograd over all rows of the step at once."""
        batch, accumulation = split
        rows = tiny.rows(batch * accumulation)
        trainer = build(
            tmp_path,
            partial(noting, layer=1),
            train_dataset=rows,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.train()
        balance: Any = trainer.distiller.balance
        expected = naive_squares(list(rows), tmp_path)
        assert balance.heard[0][1].tolist() == pytest.approx(expected, rel=1e-4)

    def test_a_step_that_rehearses_says_so(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Terms with a memory of their own can tell."""
        trainer = build(tmp_path, partial(noting, layer=None))
        forward, seen = trainer.distiller.forward, []

        def watching(batch: Any, teacher: Any, step: Step) -> Any:
            seen.append((step.rehearsal, torch.is_grad_enabled(), trainer.distiller.training))
            return forward(batch, teacher, step)

        monkeypatch.setattr(trainer.distiller, "forward", watching)
        trainer.train()
        rehearsed, trained = (True, False, True), (False, True, True)
        assert seen == [rehearsed, trained, trained, rehearsed, trained]

    def test_what_terms_observe_in_it_is_dropped(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, partial(noting, layer=0), [CrossEntropy(), Watched()])
        trainer.train()
        term: Any = trainer.run.terms["Watched"]
        assert term.heard == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "gemma3", "bert"])
    def test_every_family_has_gradients_at_every_layer(self, tmp_path: Path, family: str) -> None:
        make = tiny.bert if family == "bert" else tiny.MODELS[family]
        for layer in (0, 1, make().config.num_hidden_layers):
            trainer = build(
                tmp_path,
                partial(noting, layer=layer),
                [CrossEntropy(), Logits()],
                student=make(),
                teacher=make(),
                max_steps=1,
            )
            trainer.train()
            balance: Any = trainer.distiller.balance
            squares = balance.heard[0][1]
            assert squares.isfinite().all()
            assert squares[0] > 0

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    @pytest.mark.parametrize(
        "changes",
        [
            {"activation_checkpointing": True},
            pytest.param(
                {"torch_compile": True, "torch_compile_backend": "aot_eager"},
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_checkpointed_and_compiled_students(self, tmp_path: Path, changes: Any) -> None:
        heard = []
        plain: dict[str, Any] = {}
        for given in (plain, changes):
            wanted = [CrossEntropy(), Logits()]
            trainer = build(tmp_path, partial(noting, layer=0), wanted, max_steps=1, **given)
            trainer.train()
            balance: Any = trainer.distiller.balance
            heard.append(balance.heard[0][1])
        assert torch.allclose(heard[0], heard[1], rtol=1e-4)

    def test_bf16_is_close(self, tmp_path: Path) -> None:
        heard = []
        for bf16 in (False, True):
            trainer = build(tmp_path, partial(noting, layer=1), max_steps=1, bf16=bf16)
            trainer.train()
            balance: Any = trainer.distiller.balance
            heard.append(balance.heard[0][1].sqrt())
        assert torch.allclose(heard[0], heard[1], rtol=5e-2)

    def test_a_layer_below_all_that_is_trained(self, tmp_path: Path) -> None:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        wanted = [CrossEntropy(), AttentionMaps(layers=partial(layers.explicit, pairs=[[1, 2]]))]
        trainer = build(tmp_path, gradient, wanted, peft_config=adapter)
        with pytest.raises(InputError, match="balance: CrossEntropy has no gradient at the layer"):
            trainer.train()
        build(tmp_path, partial(gradient, layer=1), [CrossEntropy()], peft_config=adapter).train()

    def test_a_term_that_the_layer_does_not_see(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, partial(noting, layer=2))
        message = "balance: HiddenStates has no gradient at the layer of the student"
        with pytest.raises(InputError, match=message):
            trainer.train()

    def test_reentrant_checkpointing_is_refused(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"activation_checkpointing": True}
        options["activation_checkpointing_kwargs"] = {"use_reentrant": True}
        with pytest.raises(ValueError, match="balance has no gradient under reentrant"):
            build(tmp_path, gradient, **options).train()


class WatchedTerm(Term):
    """Counts its own backward passes."""

    observes = 1

    def __init__(self) -> None:
        nothing = Request(hidden=frozenset({2}))
        super().__init__(nothing, Request())
        self.heard: list[float] = []

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        states = student.hidden(2, batch.supervised)
        states.register_hook(self._count)
        return states.square().mean(-1).sum()

    def _count(self, gradient: Tensor) -> None:
        del gradient
        assert self.observed is not None
        self.observed += 1.0

    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        assert observed is not None
        self.heard.append(float(observed))


@dataclass(frozen=True, kw_only=True)
class Watched(Objective):
    """An objective of somebody's own."""

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        return WatchedTerm()


def naive_squares(rows: list[Any], folder: Path) -> list[float]:
    """Squared norms of each term's gradient at hidden state 1, one sequence at a time, float64."""
    student, teacher = tiny.llama("student").double(), tiny.llama("teacher").double()
    trainer = build(folder, None)
    term: Any = trainer.run.terms["HiddenStates"]  # its projector is drawn from the seed
    projector = term.projectors[0].double()
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    squares = [0.0, 0.0, 0.0]
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        ours = student(ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(ids, output_hidden_states=True)
        kept = labels != -100
        z, t = ours.logits[0, :-1][kept], theirs.logits[0, :-1][kept]
        state = ours.hidden_states[1]
        nll = torch.nn.functional.cross_entropy(z, labels[kept], reduction="sum")
        log_q, log_p = (z / 2).log_softmax(-1), (t / 2).log_softmax(-1)
        kl = 4 * (log_p.exp() * (log_p - log_q)).sum()
        hint, target = projector(state[0, :-1][kept]), theirs.hidden_states[2][0, :-1][kept]
        width = target.shape[-1:]
        a, b = (torch.nn.functional.layer_norm(x, width) for x in (hint, target))
        distance = (a - b).square().mean(-1).sum()
        for k, value in enumerate((nll, kl, distance)):
            (slope,) = torch.autograd.grad(value / count, state, retain_graph=True)
            squares[k] += float(slope.square().sum())
    return squares


class TestBalancedTraining:
    def test_normalised_terms_count_as_their_weights(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, normalised)
        trainer.train()
        first = logs(trainer)[0]
        assert first["loss"] == pytest.approx(0.1 + 1.0 + 0.5, rel=1e-5)
        assert first["weight/Logits"] == pytest.approx(1 / first["loss/Logits"], rel=1e-5)

    @pytest.mark.parametrize("balance", EVERY)
    def test_the_loss_is_of_the_weights_that_are_logged(self, tmp_path: Path, balance: Any) -> None:
        """Schedules included."""
        fading = HiddenStates(weight=partial(linear, start=1.0, end=0.0))
        trainer = build(tmp_path, balance, [CrossEntropy(weight=0.1), Logits(), fading])
        trainer.train()
        names = ("CrossEntropy", "Logits", "HiddenStates")
        assert len(logs(trainer)) == 3
        for log in logs(trainer):
            expected = sum(log[f"weight/{name}"] * log[f"loss/{name}"] for name in names)
            assert log["loss"] == pytest.approx(expected, rel=1e-5)

    def test_normalised_weights_follow_the_logged_means(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, partial(normalised, momentum=0.5), max_steps=4)
        trainer.train()
        values = [log["loss/Logits"] for log in logs(trainer)]
        means = [values[0], values[0], (values[0] + 2 * values[1]) / 3]
        means.append((values[0] + 2 * values[1] + 4 * values[2]) / 7)
        told = [log["weight/Logits"] for log in logs(trainer)]
        assert told == pytest.approx([1 / mean for mean in means], rel=1e-4)

    def test_gradients_balanced_in_the_first_step_are_as_the_weights(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, partial(gradient, layer=1), max_steps=1)
        trainer.train()
        (log,) = logs(trainer)
        norms = [square**0.5 for square in naive_squares(list(tiny.rows(8)), tmp_path)]
        names = ("CrossEntropy", "Logits", "HiddenStates")
        weighted = [log[f"weight/{n}"] * norm for n, norm in zip(names, norms, strict=True)]
        total = 0.1 * norms[0] + norms[1] + 0.5 * norms[2]
        shares = [0.1 / 1.6, 1.0 / 1.6, 0.5 / 1.6]
        assert weighted == pytest.approx([share * total for share in shares], rel=1e-3)

    @pytest.mark.parametrize("balance", EVERY)
    def test_evaluations_have_the_weights_as_written(self, tmp_path: Path, balance: Any) -> None:
        trainer = build(tmp_path, balance, eval_dataset=tiny.rows(8))
        trainer.train()
        metrics = trainer.evaluate()
        terms = {"CrossEntropy": 0.1, "Logits": 1.0, "HiddenStates": 0.5}
        expected = sum(weight * metrics[f"eval_loss/{name}"] for name, weight in terms.items())
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("balance", EVERY)
    def test_a_term_without_items_in_a_step(self, tmp_path: Path, balance: Any) -> None:
        """Only valid tokens in the second step: state and weights stay numbers."""
        rows = tiny.rows(24, empty=tuple(range(8, 16)))
        wanted = [Logits(), HiddenStates(rows="valid")]
        trainer = build(tmp_path, balance, wanted, train_dataset=list(rows))
        trainer.train()
        assert "loss/Logits" not in logs(trainer)[1]
        assert all(math.isfinite(value) for log in logs(trainer) for value in log.values())
        assert all(torch.isfinite(v).all() for v in trainer.distiller.balance.state_dict().values())

    @pytest.mark.parametrize("balance", [partial(normalised, floor=0.1), *EVERY[1:]])
    def test_equal_models_have_nothing_to_learn(self, tmp_path: Path, balance: Any) -> None:
        """Nothing explodes where every value and gradient is 0."""
        models = {"student": tiny.llama("teacher"), "teacher": tiny.llama("teacher")}
        before = {k: v.clone() for k, v in models["student"].state_dict().items()}
        trainer = build(tmp_path, balance, [Logits(), HiddenStates()], **models)
        trainer.train()
        assert furthest(before, weights(trainer)) < 1e-5

    @pytest.mark.parametrize("balance", EVERY)
    def test_blocks_that_learn_alone_go_without_it(self, tmp_path: Path, balance: Any) -> None:
        """The first step that all take together is measured before, as else the first of all."""
        hint = HiddenStates(blockwise=0.5, weight=0.5)
        trainer = build(tmp_path, balance, [CrossEntropy(), Logits(), hint], max_steps=4)
        seen: list[tuple[int, bool]] = []
        forward = trainer.distiller.forward

        def noting(batch: Any, teacher: Any, step: Step) -> Any:
            seen.append((trainer.state.global_step, step.rehearsal))
            return forward(batch, teacher, step)

        trainer.distiller.forward = noting  # type: ignore[method-assign]  # to look
        trainer.train()
        rehearsed = [done for done, rehearsal in seen if rehearsal]
        assert rehearsed == ([] if balance is uncertainty else [2])
        for log in logs(trainer)[:2]:
            assert log["weight/HiddenStates"] == 0.5
            assert log["loss"] == pytest.approx(0.5 * log["loss/HiddenStates"], rel=1e-5)
        assert all(log["weight/Logits"] > 0 for log in logs(trainer)[2:])

    def test_the_table_before_training_tells(self, tmp_path: Path, capsys: Any) -> None:
        trainer = build(tmp_path, normalised)
        trainer.announces = True
        trainer.train()
        assert "balance: normalised: each term over its running mean" in capsys.readouterr().err

    def test_what_cannot_be_is_refused_before_weights_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def loading(*args: Any) -> None:
            raise AssertionError(args)

        monkeypatch.setattr("llm_distill.trainer.load_student", loading)
        with pytest.raises(InputError, match="balance: gradient: layer=99; the student has hidden"):
            build(tmp_path, partial(gradient, layer=99))
