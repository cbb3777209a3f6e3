"""Student and terms as one module: sums, shares, empty batches, and what wrappers look at."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits
from llm_distill.binding import bind, needs_valid, query_plan, teacher_request
from llm_distill.collation import RowCollator
from llm_distill.distiller import Distiller
from llm_distill.evaluation import Tally
from llm_distill.objectives import MEASURES
from llm_distill.preparation import make_batch
from llm_distill.projectors import fit_least_squares
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
    loss, sums, logits = distiller(given, source(given), step(shares))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    expected = (torch.tensor(shares) * sums).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert not sums.requires_grad
    assert logits is None


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
    loss, sums, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0]))
    assert float(loss.detach()) == 0.0
    assert not sums.any()
    loss.backward()
    trained = [p for p in distiller.parameters() if p.grad is not None]
    assert len(trained) == len(list(distiller.parameters()))
    assert not any(p.grad.any() for p in trained if p.grad is not None)


def test_measures_do_not_touch_the_loss() -> None:
    distiller, source, batch = parts()
    given = batch(tiny.batch())
    plain, sums, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0]))
    loss, more, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0], measure=True))
    assert float(plain.detach()) == float(loss.detach())
    assert torch.equal(more[: len(sums)], sums)
    measured = dict(zip(MEASURES, more[len(sums) :].tolist(), strict=True))
    assert measured["student_nll"] == pytest.approx(float(sums[0]), rel=1e-6)
    assert measured["kl"] == pytest.approx(float(sums[1]), rel=1e-6)


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
        loss, sums, _ = distiller(given, source(given), step([1.0, 1.0, 1.0, 1.0]))
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

    distiller, source, batch = parts()
    given = batch(tiny.batch())
    theirs, tally = source(given), Tally(distiller.names, torch.device("cpu"))
    with Watching():
        loss, sums, _ = distiller(given, theirs, step([0.3, 0.5, 0.7, 0.2]))
        tally.add(sums, [1] * len(distiller.names))
        loss.backward()
    assert waited == []
    with Watching():  # which does see a number that the package reads
        fit_least_squares(torch.nn.Linear(1, 1), torch.rand(3, 1), torch.rand(3, 1))
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
