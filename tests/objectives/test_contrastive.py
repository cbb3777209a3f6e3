"""Contrast, by hand from what the whole models say; and two ranks against one process."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill import CrossEntropy, DistillTrainer
from llm_distill import layers as layer_maps
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.layers import LayerMap, Row
from llm_distill.objectives.contrastive import Contrastive, ContrastiveTerm
from llm_distill.rows import Batch, RowKind
from llm_distill.signals import ModelSpec, Request, Signals
from tests import reference_features, tiny
from tests.launch import launch
from tests.objectives.compare import STEP, batch, read, specs, states, value

STUDENT = ModelSpec("student", "llama", depth=1, width=32, heads=4, vocabulary=128)


def bound(student: PreTrainedModel, teacher: PreTrainedModel, **settings: Any) -> ContrastiveTerm:
    torch.manual_seed(0)
    term = Contrastive(**settings).build(*specs(student, teacher))
    assert isinstance(term, ContrastiveTerm)
    return term


def plain(**settings: Any) -> ContrastiveTerm:
    """For states made by hand: embeddings are the layer-normalised states themselves."""
    term = Contrastive(embedding=32, **settings).build(STUDENT, STUDENT)
    assert isinstance(term, ContrastiveTerm)
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.copy_(torch.eye(32) if parameter.dim() == 2 else torch.zeros(32))
    return term


def texts(*ids: list[int], predicts: int = 1) -> Batch:
    """Sequences that are supervised at their last tokens."""
    data = [
        {"input_ids": row, "labels": [-100] * (len(row) - predicts) + row[len(row) - predicts :]}
        for row in ids
    ]
    collate = RowCollator(Collator(pad_token_id=0, padding_side="left"), shift=True, valid=True)
    return make_batch(collate(data), None, seed=0, epoch=0)


def numbered(count: int) -> Batch:
    """Sequences with one row each."""
    return texts(*([k + 3, k + 40] for k in range(count)))


def said(items: Tensor, given: Batch, *, gap: float = math.nan) -> Signals:
    """Signals with these states at the supervised rows, and something else everywhere else."""
    hidden = torch.full((given.inputs["input_ids"].numel(), items.shape[-1]), gap).to(items.dtype)
    hidden = hidden.index_copy(0, given.supervised.index, items)
    return Signals("made", states={1: hidden.view(*given.inputs["input_ids"].shape, -1)})


def hadamard(count: int) -> Tensor:
    """Orthogonal rows of 32 with mean 0 and variance 1, which layer normalisation leaves alone."""
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[1 : count + 1]


def embedded(x: Tensor, module: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Layer-normalised and mapped, in float64."""
    x = x.detach().double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    bias = module.bias if isinstance(module, torch.nn.Linear) else torch.zeros(())
    found: np.ndarray[Any, np.dtype[np.float64]] = (
        (x @ module.weight.double().mT + bias).detach().numpy()
    )
    return found


def pooled(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    return torch.stack([rows.mean(0) for rows in x.split([c for c in counts if c])])


@pytest.mark.parametrize("rows", ["supervised", "valid"])
@pytest.mark.parametrize("items", ["pooled", "token"])
@pytest.mark.parametrize("apart", [0, 2])
@pytest.mark.parametrize("queue", [0, 9])
def test_it_is_what_the_models_say(
    rows: RowKind,
    items: str,
    apart: int,
    queue: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
) -> None:
    """All layers of the map, false negatives left out, and a queue that was filled before."""
    apart = apart if items == "token" else 0
    given, chosen = batch(), batch().rows(rows)
    term = bound(
        student, teacher, items=items, rows=rows, apart=apart, queue=queue, embedding=12,
        layers=layer_maps.uniform, temperature=0.2,
    )  # fmt: skip
    if queue:
        value(term, student, teacher, texts([3, 4, 5, 6], [9, 8, 7], predicts=2))
    held = None if term.queue is None else [term.queue.vectors.clone(), term.queue.label.clone()]
    got = value(term, student, teacher, given)
    ours, theirs = states(student, given, rows), states(teacher, given, rows)
    labels, where = chosen.token, chosen.sequence * 1000 + chosen.position
    if items == "pooled":
        ours = [pooled(x, chosen.per_sequence) for x in ours]
        theirs = [pooled(x, chosen.per_sequence) for x in theirs]
        labels, where = torch.arange(4), torch.arange(4) * 1000
    away = (labels[:, None] == labels) | ((where[:, None] - where).abs() <= apart)
    expected = 0.0
    for place, (s, t) in enumerate(((1, 2), (2, 4))):
        z, w = embedded(ours[s], term.ours[place]), embedded(theirs[t], term.theirs[place])
        waiting, blocked = None, away.numpy()
        if held is not None:
            waiting = held[0][place].double().numpy()[held[1].numpy() >= 0]
            old = held[1][held[1] >= 0]
            blocked = np.concatenate([blocked, (labels[:, None] == old).numpy()], 1)
        found = reference_features.info_nce(z, w, 0.2, queue=waiting, blocked=blocked)
        expected += float(found.sum()) / 2
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert term.count(given) == (4 if items == "pooled" else len(chosen))


class TestOracles:
    @pytest.mark.parametrize("queue", [0, 8])
    def test_aligned_and_orthonormal(self, queue: int) -> None:
        given, x = numbered(16), hadamard(16)
        term = plain(temperature=0.1, queue=queue)
        if queue:
            term.theirs.load_state_dict({"0.weight": torch.eye(32)})
        signals = said(x, given)
        got = term(signals, signals, given, STEP) / 16
        assert got.item() == pytest.approx(math.log(1 + 15 * math.exp(-10.0)), rel=1e-4)
        assert got.item() == pytest.approx(6.8077e-4, rel=1e-4)

    def test_collapsed(self) -> None:
        given, x = numbered(16), hadamard(1).expand(16, 32)
        signals = said(x, given)
        term = plain()
        term.observed = torch.zeros(2)
        got = term(signals, signals, given, STEP) / 16
        assert got.item() == pytest.approx(math.log(16), rel=1e-6)
        assert term.observed.tolist() == [0.0, 16.0]

    def test_embeddings_train_to_tell_items_apart(self) -> None:
        """From unrelated states to an accuracy of 1; no other ever counts."""
        given = numbered(8)
        torch.manual_seed(0)
        term = Contrastive(embedding=8).build(STUDENT, STUDENT)
        ours, theirs = (said(torch.randn(8, 32), given) for _ in range(2))
        optimizer = torch.optim.Adam(term.parameters(), lr=1e-2)
        for _ in range(60):
            term.observed = torch.zeros(2)
            optimizer.zero_grad()
            term(ours, theirs, given, STEP).backward()
            optimizer.step()
        assert term.observed is not None
        term.after_step(torch.zeros(()), 1.0, term.observed)
        assert isinstance(term, ContrastiveTerm)
        assert term.accuracy == 1.0


class TestRules:
    """G1 to G7."""

    def run(
        self, term: ContrastiveTerm, x: Tensor, y: Tensor, given: Batch, gap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Value and gradient of the student's states."""
        x = x.clone().requires_grad_()
        got = term(said(x, given, gap=gap), said(y, given, gap=gap), given, STEP)
        got.backward()
        assert x.grad is not None
        return got.detach(), x.grad

    @pytest.mark.parametrize("items", ["pooled", "token"])
    def test_nothing_is_read_beside_the_rows(self, items: str) -> None:
        given = texts([3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14], predicts=2)
        x, y = torch.randn(2, 6, 32).unbind()
        results = []
        for gap in (0.0, math.nan, 1e4):
            term = plain(items=items)
            found = self.run(term, x, y, given, gap)
            results.append(
                [*found, *(p.grad.clone() for p in term.parameters() if p.grad is not None)]
            )
        assert len(results[0]) == 6
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_the_teacher_gets_no_gradient(self) -> None:
        given = numbered(4)
        y = torch.randn(4, 32, requires_grad=True)
        term = plain()
        term(said(torch.randn(4, 32), given), said(y, given), given, STEP).backward()
        assert y.grad is None
        assert all(p.grad is not None and p.grad.any() for p in term.parameters())

    def test_it_belongs_to_its_micro_batch(self) -> None:
        """No sum over parts: there are fewer to be told apart from."""
        x, y = torch.randn(2, 4, 32).unbind()
        whole, _ = self.run(plain(), x, y, numbered(4))
        parts = [
            self.run(plain(), a, b, numbered(2))[0]
            for a, b in zip(x.split(2), y.split(2), strict=True)
        ]
        assert whole > sum(parts)

    def test_order_does_not_matter(self) -> None:
        ids = [[3, 4], [5, 6], [7, 8]]
        x, y = torch.randn(2, 3, 32).unbind()
        there, gradient = self.run(plain(), x, y, texts(*ids))
        back, reversed_gradient = self.run(plain(), x.flip(0), y.flip(0), texts(*ids[::-1]))
        assert torch.allclose(there, back)
        assert torch.allclose(gradient, reversed_gradient.flip(0), atol=1e-6)

    @pytest.mark.parametrize("items", ["pooled", "token"])
    def test_its_gradient(self, items: str) -> None:
        given = texts([3, 4, 5, 6, 7], [8, 9, 4], predicts=2)
        term = plain(items=items, temperature=0.5).double()
        y = said(torch.randn(4, 32).double(), given)
        x = torch.randn(4, 32).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: term(said(x, given), y, given, STEP), x)

    def test_low_precision_is_computed_in_fp32(self) -> None:
        given = numbered(6)
        x, y = torch.randn(2, 6, 32).unbind()
        term = plain()
        exact = term(said(x, given), said(y, given), given, STEP)
        with torch.autocast("cpu", torch.bfloat16):
            same = term(said(x, given), said(y, given), given, STEP)
            close = term(said(x.bfloat16(), given), said(y.bfloat16(), given), given, STEP)
        assert torch.equal(same, exact)
        assert close.dtype is torch.float32
        assert close.item() == pytest.approx(exact.item(), rel=2e-2)

    @pytest.mark.parametrize("items", ["pooled", "token"])
    @pytest.mark.parametrize("queue", [0, 5])
    def test_no_items_are_a_zero_with_a_graph(
        self, items: str, queue: int, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term, given = bound(student, teacher, items=items, queue=queue), batch(empty=(0, 1, 2, 3))
        got = value(term, student, teacher, given)
        got.backward()
        assert (got.item(), term.count(given), term.skipped(given)) == (0.0, 0, 0)
        assert all(p.grad is not None and not p.grad.any() for p in term.parameters())

    @pytest.mark.parametrize("items", ["pooled", "token"])
    def test_an_item_alone_is_skipped(self, items: str) -> None:
        given, x = numbered(1), torch.randn(1, 32)
        term = plain(items=items)
        got = term(said(x, given), said(x, given), given, STEP)
        got.backward()
        assert (got.item(), term.count(given), term.skipped(given)) == (0.0, 0, 1)
        assert all(p.grad is not None and not p.grad.any() for p in term.parameters())

    def test_with_a_queue_an_item_alone_counts(self) -> None:
        term, given = plain(queue=4), numbered(1)
        assert (term.count(given), term.skipped(given)) == (1, 0)
        first, _ = self.run(term, torch.randn(1, 32), torch.randn(1, 32), given)
        second, gradient = self.run(term, torch.randn(1, 32), torch.randn(1, 32), texts([9, 9]))
        assert first == 0.0
        assert second > 0.0
        assert gradient.isfinite().all()
        assert gradient.any()


class TestFalseNegatives:
    def without(self, x: Tensor, y: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
        """Each anchor alone with those candidates that it has."""
        z, w = (torch.nn.functional.layer_norm(side, (32,)) for side in (x, y))
        z, w = z / z.norm(dim=-1, keepdim=True), w / w.norm(dim=-1, keepdim=True)
        values = []
        for i in range(len(x)):
            kept = [j for j in range(len(x)) if (i, j) not in pairs and (j, i) not in pairs]
            for anchor, candidates in ((z[i], w[kept]), (w[i], z[kept])):
                values.append(-(candidates @ anchor / 0.07).log_softmax(0)[kept.index(i)] / 2)
        return torch.stack(values).sum()

    @pytest.mark.parametrize(
        ("items", "ids", "pairs"),
        [
            ("token", [[5, 1], [6, 1], [5, 2]], [(0, 2)]),
            ("token", [[5, 1], [5, 2], [5, 3]], [(0, 1), (0, 2), (1, 2)]),
            ("pooled", [[5, 1], [5, 2], [5, 1]], [(0, 2)]),
        ],
    )
    def test_they_are_as_if_they_were_not_there(
        self, items: str, ids: list[list[int]], pairs: list[tuple[int, int]]
    ) -> None:
        """Same token, or same text: value and gradient of the candidates that are left."""
        given, y = texts(*ids), torch.randn(3, 32)
        x = torch.randn(3, 32, requires_grad=True)
        got = plain(items=items)(said(x, given), said(y, given), given, STEP)
        expected = self.without(x, y, pairs)
        assert torch.allclose(got, expected, atol=1e-5)
        (gradient,) = torch.autograd.grad(got, x)
        (wanted,) = torch.autograd.grad(expected, x)
        assert torch.allclose(gradient, wanted, atol=1e-5)

    def test_in_the_queue_as_well(self) -> None:
        """A second epoch over the same texts finds itself there."""
        term, given, x = plain(queue=8), numbered(1), torch.randn(2, 1, 32)
        values = [term(*(said(side, now) for side in x), now, STEP) for now in (given, given)]
        assert values == [0.0, 0.0]
        other = texts([50, 51])
        assert term(*(said(side, other) for side in x), other, STEP) > 0.0


class TestQueue:
    def test_it_holds_the_teachers_embeddings_of_training_alone(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = bound(student, teacher, queue=6, embedding=16)
        assert [name for name, _ in term.named_parameters()] == ["ours.0.weight", "ours.0.bias"]
        assert term.queue is not None
        term.eval()
        value(term, student, teacher, batch())
        term.train()
        signals = [
            read(model, Request(hidden=frozenset({k})), batch())
            for model, k in ((student, 2), (teacher, 4))
        ]
        term(*signals, batch(), replace(STEP, rehearsal=True))
        assert int(term.queue.seen) == 0
        value(term, student, teacher, batch())
        theirs = pooled(states(teacher, batch(), "supervised")[4], batch().supervised.per_sequence)
        vectors = torch.tensor(embedded(theirs, term.theirs[0])).float()
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        assert torch.allclose(term.queue.vectors[0, :4], vectors, atol=1e-6)
        assert term.queue.label.tolist() == [*batch().draw.keys, -1, -1]

    def test_a_loaded_state_goes_on_bit_for_bit(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        given = [batch(), texts([3, 4, 5], [9, 8, 7], predicts=2), texts([8, 4, 5], [6, 8, 7])]
        one = bound(student, teacher, queue=5, items="token")
        value(one, student, teacher, given[0])
        torch.manual_seed(1)
        other = Contrastive(queue=5, items="token").build(*specs(student, teacher))
        other.load_state_dict(one.state_dict())
        for later in given[1:]:
            assert torch.equal(
                value(one, student, teacher, later), value(other, student, teacher, later)
            )


class TestSettings:
    def test_fewer_items_stand_for_all(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = bound(student, teacher, most=2)
        term.observed = torch.zeros(2)
        got = value(term, student, teacher, batch())
        assert (term.count(batch()), term.observed.tolist()[1]) == (4, 2.0)
        drawn = replace(term.spec, most=None)
        assert (
            0.0
            < got
            < 2 * value(bound(student, teacher, most=drawn.most), student, teacher, batch())
        )

    def test_mixtures_of_layers_are_mixed(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        def at(row: Row) -> Tensor:
            term = bound(student, teacher, layers=LayerMap((row,), 2, 4, "by hand"))
            assert term.teacher == Request(hidden=frozenset(row.layers))
            return value(term, student, teacher, batch())

        alone = at(Row(2, ((3, 1.0),)))
        assert torch.allclose(at(Row(2, ((2, 1e-9), (3, 1.0 - 1e-9)))), alone)
        assert not torch.allclose(at(Row(2, ((2, 0.5), (3, 0.5)))), alone)

    def test_layers_may_be_drawn_anew(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        term = bound(student, teacher, layers=layer_maps.random)
        assert term.teacher.hidden == frozenset({1, 2, 3, 4})
        later = batch()
        later = replace(later, draw=replace(later.draw, epoch=4))
        assert value(term, student, teacher, batch()) != value(term, student, teacher, later)

    def test_layers_whose_shares_are_trained_are_refused(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        with pytest.raises(ValueError, match=r"shares that are trained .* write a strategy that"):
            bound(student, teacher, layers=layer_maps.learned)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temperature": 0.0}, r"temperature is 0.0; write a number above 0 \(0.07\)"),
            ({"temperature": math.inf}, "temperature is inf"),
            ({"embedding": 0}, "embedding is 0; write a number from 1 on"),
            ({"most": 1}, "most is 1; write a number from 2 on"),
            ({"skip": -1}, "skip is -1; write a number from 0 on"),
            ({"queue": -1}, "queue is -1; write a number from 0 on"),
            ({"apart": -1, "items": "token"}, "apart is -1; write a number from 0 on"),
            ({"apart": 2}, "items are pooled, one for a sequence; write items: token"),
            ({"items": "sequence"}, "items is 'sequence'; write one of pooled, token"),
            ({"rows": "all"}, "rows is 'all'; write one of supervised, valid"),
            ({"queue": 4, "layers": layer_maps.random}, "changes in the training; write queue: 0"),
        ],
    )
    def test_what_cannot_work_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"Contrastive: .*{message}"):
            Contrastive(**settings)

    def test_it_is_described(self) -> None:
        assert Contrastive(items="token", apart=2, skip=1, queue=64).describe() == (
            "InfoNCE, embedding 128, temperature 0.07, supervised rows, items token, without the "
            "first 1 tokens, at most 1024 at once, 2 tokens apart, queue 64, teacher's embedding "
            "fixed"
        )


class TestTraining:
    def trainer(self, folder: Path, **changes: Any) -> DistillTrainer:
        objectives = [
            CrossEntropy(),
            Contrastive(queue=12, embedding=16),
            Contrastive(items="token"),
        ]
        return DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            objectives,
            tiny.arguments(folder, **changes),
            train_dataset=tiny.rows(),
        )

    def test_three_steps(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path)
        terms = list(trainer.run.terms.values())[1:]
        start = [p.detach().clone() for term in terms for p in term.parameters()]
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["loss/Contrastive"] > 0 and log["loss/Contrastive.2"] > 0 for log in logs] == [
            True
        ] * 3
        moved = [p for term in terms for p in term.parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
        for term in terms:
            assert isinstance(term, ContrastiveTerm)
            assert term.accuracy is not None
            assert 0.0 <= term.accuracy <= 1.0

    def test_a_step_without_items_has_no_accuracy(self, tmp_path: Path) -> None:
        """Its log has no NaN: one sequence alone is skipped."""
        trainer = DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            [CrossEntropy(), Contrastive()],
            tiny.arguments(tmp_path, max_steps=2, per_device_train_batch_size=2),
            train_dataset=tiny.rows(3),
        )
        trainer.train()
        first, second = trainer.state.log_history[:2]
        assert "accuracy/Contrastive" in first
        assert second["skipped/Contrastive"] == 1.0
        assert "accuracy/Contrastive" not in second

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    def test_compiled_equals_eager(self, tmp_path: Path) -> None:
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        found = []
        for changes in ({}, settings):
            trainer = self.trainer(tmp_path, **changes)
            trainer.train()
            found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert found[1] == pytest.approx(found[0], rel=1e-5)

    def test_a_checkpoint_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        """The queue with it."""
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        straight = self.trainer(tmp_path, **settings)
        straight.train()
        resumed = self.trainer(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        there, here = straight.distiller.state_dict(), resumed.distiller.state_dict()
        assert int(here["terms.1.queue.seen"]) == 32
        assert all(torch.equal(there[name], here[name]) for name in there)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each engine came to."""
    folder = tmp_path_factory.mktemp("contrast")
    for engine, ranks in (("one", 1), ("ddp", 2), ("fsdp2", 2)):
        launch("tests.contrastive_worker", engine, str(folder), ranks=ranks)
    return {e: torch.load(folder / f"{e}.pt") for e in ("one", "ddp", "fsdp2")}


@pytest.mark.distributed
class TestRanks:
    """2 ranks x 4 sequences against 1 process x 8: SGD at 1e-2 in fp32, gradients of about 30."""

    BOUND = 1e-6

    @pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
    @pytest.mark.parametrize("label", ["full", "empty", "lonely"])
    def test_ranks_are_as_one_process(
        self, results: dict[str, Any], label: str, engine: str
    ) -> None:
        """Weights, embeddings and queue; the log; an evaluation; what was found.

        `empty`: a rank without any item in the first step. `lonely`: one sequence on all ranks,
        which one process skips, and which counts as 0 where its rank cannot know.
        """
        one, many = results["one"][label], results[engine][label]
        assert one["state"].keys() == many["state"].keys()
        for name, expected in one["state"].items():
            assert (many["state"][name] - expected).abs().max() <= self.BOUND, name
        for log, expected in zip(many["logs"], one["logs"], strict=False):
            assert log == pytest.approx({"loss/pooled": 0.0} | expected, rel=1e-6)
        assert ("loss/pooled" in one["logs"][0]) == (label != "lonely")
        assert many["eval"] == pytest.approx(one["eval"], rel=1e-6)
        assert many["accuracy"] == pytest.approx(one["accuracy"])

    def test_the_queue_ran_over(self, results: dict[str, Any]) -> None:
        state = results["one"]["full"]["state"]
        assert int(state["terms.3.queue.seen"]) > 100
        assert int(state["terms.3.queue.label"].min()) > 0
