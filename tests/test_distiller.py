"""Student and terms as one module: sums, shares, empty batches, and what wrappers look at."""

import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits, Taid, jsd
from llm_distill.binding import bind, needs_valid, query_plan, teacher_request
from llm_distill.collation import RowCollator
from llm_distill.distiller import Distiller, free_memory
from llm_distill.ledger import Ledger, Ranks
from llm_distill.objectives import MEASURES
from llm_distill.preparation import make_batch
from llm_distill.projectors import Moments, fit_least_squares
from llm_distill.rows import Batch, Step
from llm_distill.signals import ModelSpec, Request
from llm_distill.teachers.local import Local
from tests import tiny

PACKAGE = Path(__file__).parent.parent / "llm_distill"
WANTED = [CrossEntropy(), Logits(), HiddenStates(), AttentionMaps(queries=3)]


def parts(wanted: Any = None) -> tuple[Distiller, Any, Any]:
    """A distiller, its teacher, and how to make a batch of what a collator gives."""
    student, teacher = tiny.llama("student"), Local(tiny.llama("teacher"))
    spec = ModelSpec.of(student.config, "student")
    terms = bind(wanted or WANTED, spec, teacher.spec, seed=0)
    request = teacher_request(terms) | Request(logits=True)
    source = teacher.open(request, torch.device("cpu"))

    def batch(inputs: Any) -> Batch:
        rows = RowCollator(lambda _: dict(inputs), shift=True, valid=needs_valid(terms))
        return make_batch(rows([]), query_plan(terms), seed=0, epoch=0)

    return Distiller(student, terms, "student"), source, batch


def step(shares: list[float], **options: Any) -> Step:
    return Step(0.0, torch.tensor(shares), **options)


def test_loss_is_the_shared_sum_of_the_terms() -> None:
    distiller, source, batch = parts()
    given = batch(tiny.batch())
    shares = [0.3, 0.5, 0.7, 0.2]
    loss, sums, faults, logits = distiller(given, source(given), step(shares))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    expected = (torch.tensor(shares) * sums).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert not sums.requires_grad
    assert logits is None
    assert not faults.any()


def test_each_term_has_its_own_gradient() -> None:
    """The gradient is linear in the shares."""
    gradients = []
    for shares in ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        distiller, source, batch = parts()
        given = batch(tiny.batch())
        distiller(given, source(given), step(shares))[0].backward()
        given_to: dict[str, Any] = {n: p.grad for n, p in distiller.named_parameters()}
        gradients.append(given_to)
    a, b, both = gradients
    for name, whole in both.items():
        pieces = torch.stack([g[name] for g in (a, b) if g[name] is not None])
        bound = 1e-5 * max(1.0, float(whole.abs().max()))
        assert torch.allclose(pieces.sum(0), whole, atol=bound)


def test_no_rows_give_zero_with_a_graph() -> None:
    """A rank without supervised tokens must still take part: a skipped forward hangs DDP."""
    distiller, source, batch = parts()
    inputs = tiny.batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    given = batch(inputs)
    loss, sums, _, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0]))
    assert float(loss.detach()) == 0.0
    assert not sums.any()
    loss.backward()
    trained = [p for p in distiller.parameters() if p.grad is not None]
    assert len(trained) == len(list(distiller.parameters()))
    assert not any(p.grad.any() for p in trained if p.grad is not None)


def test_measures_do_not_touch_the_loss() -> None:
    distiller, source, batch = parts()
    given = batch(tiny.batch())
    plain, sums, _, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0]))
    loss, more, _, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0], measure=True))
    assert float(plain.detach()) == float(loss.detach())
    assert torch.equal(more[: len(sums)], sums)
    measured = dict(zip(MEASURES, more[len(sums) :].tolist(), strict=True))
    assert measured["student_nll"] == pytest.approx(float(sums[0]), rel=1e-6)
    assert measured["kl"] == pytest.approx(float(sums[1]), rel=1e-6)


def test_inference_mode_gives_the_same_numbers() -> None:
    distiller, source, batch = parts([*WANTED, Logits(loss=jsd, target=Taid(), name="moving")])
    given = batch(tiny.batch())
    asked = step([0.3, 0.5, 0.7, 0.2, 0.1], measure=True, logits=True)
    trained = distiller(given, source(given), asked)
    with torch.inference_mode():
        outcome = distiller(given, source(given), asked)
    assert float(outcome.loss) == pytest.approx(float(trained.loss.detach()), rel=1e-6)
    assert torch.allclose(outcome.sums, trained.sums)
    assert outcome.logits is not None


def test_infinite_measures_are_infinite_and_no_fault() -> None:
    """The term is bounded; the KL that is measured with it is infinite, and says so."""
    distiller, source, batch = parts([Logits(loss=jsd)])
    forbid(distiller.student, 7)
    given = batch(tiny.batch())
    outcome = distiller(given, source(given), step([1.0], measure=True))
    measured = dict(zip(MEASURES, outcome.sums[1:].tolist(), strict=True))
    assert measured["kl"] == math.inf
    assert outcome.sums[0].isfinite()
    assert math.isfinite(measured["entropy"])
    assert not outcome.faults.any()


def test_infinite_terms_are_infinite_and_a_fault() -> None:
    """The other rows keep loss and gradient."""
    distiller, source, batch = parts([CrossEntropy(), Logits()])
    forbid(distiller.student, 7)
    given = batch(tiny.batch())
    outcome = distiller(given, source(given), step([1.0, 1.0]))
    assert outcome.sums[1] == math.inf
    assert outcome.faults[:2].tolist() == [len(given.supervised), 1]
    assert outcome.loss.isfinite()
    outcome.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in distiller.parameters())


def forbid(model: Any, token: int) -> None:
    """A head whose bias gives a token no chance at all."""
    old = model.lm_head
    model.lm_head = torch.nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        model.lm_head.weight.copy_(old.weight)
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = -math.inf


def test_rows_per_chunk_are_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the memory that is free at the first pass; the result does not hang on them."""
    losses = []
    for rows in (None, 1, 5, 1000):
        distiller, source, batch = parts()
        distiller.rows_per_chunk = rows
        given = batch(tiny.batch())
        asked = [0]

        def free(device: torch.device, asked: list[int] = asked) -> int:
            asked[0] += 1
            return 1 << 20

        monkeypatch.setattr("llm_distill.distiller.free_memory", free)
        for _ in range(2):
            outcome = distiller(given, source(given), step([1.0] * 4))
        losses.append(float(outcome.loss.detach()))
        assert asked == [1 if rows is None else 0]
        # An eighth of 1 MiB holds 128 rows of two models' 128 fp32 logits.
        assert distiller.rows_per_chunk == (rows or 128)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_free_memory() -> None:
    assert free_memory(torch.device("cpu")) > 1 << 20


def test_nothing_of_the_teacher_is_inside() -> None:
    distiller, source, _ = parts()
    inside = {id(p) for p in distiller.parameters()}
    assert not any(id(p) in inside for p in source.model.parameters())


def test_pads_change_neither_values_nor_gradients() -> None:
    """Seven more columns of padding, holding other tokens."""
    results = []
    for extra in (0, 7):
        distiller, source, batch = parts()
        inputs = tiny.batch()
        fill = {"input_ids": 99, "attention_mask": 0, "labels": -100}
        inputs = {
            key: torch.nn.functional.pad(value, (0, extra), value=fill[key])
            for key, value in inputs.items()
        }
        given = batch(inputs)
        loss, sums, _, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0]))
        loss.backward()
        gradients: list[Any] = [p.grad for p in distiller.parameters()]
        results.append((sums, gradients))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(1.0, float(a.abs().max())))


def test_it_saves_the_plain_student(tmp_path: Path) -> None:
    """`trainer.model.save_pretrained(folder)`, as one writes it with Trainer."""
    distiller = parts()[0]
    distiller.save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = distiller.student.state_dict()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_the_host_waits_for_no_tensor() -> None:
    """Neither sums nor shares are read where they are made: a GPU would have to finish first."""
    waited: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                files = [Path(frame.filename) for frame in traceback.extract_stack()]
                caller = next(f for f in reversed(files[:-1]) if "torch" not in f.parts)
                if caller.is_relative_to(PACKAGE):  # transformers reads its masks
                    waited.append(caller.name)
            return func(*args, **(kwargs or {}))

    distiller, source, batch = parts([*WANTED, Logits(loss=jsd, target=Taid(), name="moving")])
    given = batch(tiny.batch())
    theirs = source(given)
    alone = Ranks(torch.device("cpu"), reduce=torch.clone, gather=torch.clone)
    terms: Any = dict(zip(distiller.names, distiller.terms, strict=True))
    ledger = Ledger(terms, alone)
    with Watching():
        outcome = distiller(given, theirs, step([0.3, 0.5, 0.7, 0.2, 0.1], measure=True))
        ledger.add(outcome, [1] * 5, 5, items=torch.ones(5), step=1)
        ledger.after_step(0.5)
        outcome.loss.backward()
    # The pass over the head asks a CPU for numbers, and only a CPU.
    assert set(waited) <= {"fused.py", "scoring.py"}
    assert float(terms["moving"].mix) == pytest.approx(0.7)
    waited.clear()
    with Watching():  # which does see a number that the package reads
        fit_least_squares(torch.nn.Linear(1, 1), Moments.of(torch.rand(3, 1), torch.rand(3, 1)))
    assert waited == ["projectors.py"]


def test_what_wrappers_look_at() -> None:
    distiller: Any = parts()[0]
    assert distiller.config is distiller.student.config
    assert distiller._no_split_modules == ["LlamaDecoderLayer"]
    assert distiller.get_input_embeddings() is None
    assert distiller.get_output_embeddings() is None
    assert distiller.is_activation_checkpointing is False
    distiller.activation_checkpointing_enable()
    assert distiller.is_activation_checkpointing is True
    with pytest.raises(ValueError, match="no gradient under reentrant"):
        distiller.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": True}
        )


def test_exits_are_passes_of_their_own_and_add_up() -> None:
    """Loss, sums and gradients against plain autograd through norm and head."""
    from llm_distill.losses.divergences import forward_kl

    wanted = [
        Logits(temperature=2.0, exit=1),
        CrossEntropy(),
        HiddenStates(),
        CrossEntropy(exit=1),
        Logits(),
    ]
    shares = [0.3, 0.5, 0.0, 0.7, 0.2]
    distiller, source, batch = parts(wanted)
    given = batch(tiny.batch())
    heard = source(given)
    outcome = distiller(given, heard, step(shares, measure=True))
    outcome.loss.backward()

    model = tiny.llama("student")
    states = model(**given.inputs, output_hidden_states=True).hidden_states
    rows = [model.model.norm(states[1]), states[2]]
    shallow, deep = (model.lm_head(state.flatten(0, 1)[given.supervised.index]) for state in rows)
    told, labels = heard.whole.logits(slice(None)), given.supervised.labels
    cross = torch.nn.functional.cross_entropy
    expected = {
        0: 4 * forward_kl(shallow / 2, told / 2).sum(),
        1: cross(deep, labels, reduction="sum"),
        3: cross(shallow, labels, reduction="sum"),
        4: forward_kl(deep, told).sum(),
    }
    for k, value in expected.items():
        torch.testing.assert_close(outcome.sums[k], value.detach(), rtol=1e-5, atol=1e-5)
    # The measures, which follow the terms, are of the last layer.
    torch.testing.assert_close(outcome.sums[5], expected[1].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outcome.sums[7], expected[4].detach(), rtol=1e-5, atol=1e-5)
    torch.stack([shares[k] * value for k, value in expected.items()]).sum().backward()
    own: Any = dict(distiller.student.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_fault_at_an_exit_is_found() -> None:
    distiller, source, batch = parts([CrossEntropy(), CrossEntropy(exit=1)])
    given = batch(tiny.batch())
    forbid(distiller.student, int(given.supervised.labels[0]))
    _, _, faults, _ = distiller(given, source(given), step([1.0, 1.0]))
    assert faults.any()


def test_a_teacher_that_is_none_has_to_be_within() -> None:
    distiller, _, batch = parts([CrossEntropy()])
    with pytest.raises(ValueError, match="nobody said what the teacher says"):
        distiller(batch(tiny.batch()), None, step([1.0]))
