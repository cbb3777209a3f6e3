"""The Triton path, interpreted, through the whole head pass; and what a GPU must not be asked."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import adaptive_kl, decoupled, forward_kl, jsd, reverse_kl, tvd
from llm_distill.losses import fused, kernels, launching
from llm_distill.losses.blending import Blend
from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.rowwise import Alone, Nll, RowTerm, Tempered
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.measures import entropy, measures
from llm_distill.signals import Dense
from tests.losses import test_fused as dense_pass
from tests.losses.test_fused import LOSSES, V, case, logits

# What the interpreter says of numbers that no row uses.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPEN = ("adaptive_kl", "adaptive_kl .9", "decoupled")
"""Without a kernel."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Spec]:
    """Every pass takes the Triton path where it can; what it launched."""
    pytest.importorskip("triton")
    found: list[kernels.Spec] = []
    real = kernels.score

    def score(z: Tensor, t: Tensor | None, labels: Tensor, spec: kernels.Spec) -> Any:
        found.append(spec)
        return real(z, t, labels, spec)

    monkeypatch.setattr(fused, "on_chip", lambda device, dtype: dtype in kernels.DTYPES)
    monkeypatch.setattr(kernels, "score", score)
    return found


every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_divergence(
    launches: list[kernels.Spec], name: str, dtype: torch.dtype, most: float, temperature: float
) -> None:
    """With labels, on vocabularies of two sizes, in chunks."""
    given = case(rows=9, wider=-2).to(dtype)
    term = Tempered(LOSSES[name], V - 2, temperature, factor=temperature**2)
    terms: list[RowTerm] = [term, Nll()]
    found = dense_pass.fused(given, terms, [0.7, 0.4])
    assert len(launches) == (0 if name in OPEN else 3)
    if name in OPEN:
        return  # the other path, whose numbers test_fused looks at
    expected = dense_pass.dense(given, terms, [0.7, 0.4])
    # Rounded logits flip signs where p is about q.
    most *= 4 if LOSSES[name] is tvd and dtype != torch.float32 else 1
    assert dense_pass.relative_error(found[1], expected[1]) < most
    for one, other in zip(found[2], expected[2], strict=True):
        assert dense_pass.relative_error(one, other) < most


@pytest.mark.parametrize("finish", [Finish(scale=0.5), Finish(scale=2.0, softcap=3.0)], ids=str)
def test_heads_of_other_kinds(launches: list[kernels.Spec], finish: Finish) -> None:
    given = case(rows=9, student=finish, teacher=Finish(softcap=5.0)).to(torch.float32)
    mix = torch.tensor(0.3)
    terms: list[RowTerm] = [Tempered(jsd, V, 2.0, mix=mix), Nll(), Nll()]
    shares = [0.7, 0.4, 0.1]
    found, expected = (f(given, terms, shares) for f in (dense_pass.fused, dense_pass.dense))
    assert len(launches) == 3
    dense_pass.assert_same(found, _float(expected), bound=2e-5)


def test_labels_alone(launches: list[kernels.Spec]) -> None:
    given = replace(case(rows=9).to(torch.float32), teacher=None)
    found = dense_pass.fused(given, [Nll()], [0.4])
    dense_pass.assert_same(found, _float(dense_pass.dense(given, [Nll()], [0.4])), bound=2e-5)
    assert [spec.form for spec in launches] == [None] * 3


def test_measures_beside_it(launches: list[kernels.Spec]) -> None:
    """They are measured on the logits before the gradient takes their place."""
    given = case(rows=9).to(torch.float32)
    assert isinstance(given.teacher, Projection)
    beside = measures(Dense(logits(given.teacher)), V)
    leaf = given.student.weight.clone().requires_grad_()
    student = replace(given.student, weight=leaf)
    shares = torch.tensor([0.7])
    terms = [Tempered(reverse_kl, V)]
    _, values = fused.head_pass(
        student, given.teacher, given.labels, terms, shares, measures=beside, chunk=4
    )
    assert len(launches) == 3
    expected = dense_pass.dense(given, [*terms, *beside], [0.0] * 6)[1]
    torch.testing.assert_close(values, expected.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "terms",
    [
        [Tempered(forward_kl), Tempered(jsd)],
        [dense_pass.unsure],
        [Tempered(dense_pass.two_lines)],
        [Tempered(forward_kl), Alone(entropy)],
    ],
    ids=["two divergences", "a row function", "a user's divergence", "two kinds"],
)
def test_what_the_kernels_cannot_takes_the_other_path(
    launches: list[kernels.Spec], terms: list[RowTerm]
) -> None:
    given = case(rows=9, wider=0).to(torch.float32)
    shares = [0.5] * len(terms)
    found, expected = (f(given, terms, shares) for f in (dense_pass.fused, dense_pass.dense))
    assert not launches
    dense_pass.assert_same(found, _float(expected), bound=2e-5)


def test_float64_and_sparse_teachers_take_the_other_path(launches: list[kernels.Spec]) -> None:
    given = case(rows=9)
    dense_pass.check(given, [Tempered(forward_kl, V)], [1.0])
    assert isinstance(given.teacher, Projection)
    target = TopK.of(logits(given.teacher)[:, :V], 4)
    sparse = replace(given.to(torch.float32), teacher=target)
    dense_pass.fused(sparse, [Tempered(forward_kl, V)], [1.0])
    assert not launches


def test_a_row_at_fault_counts_nothing(launches: list[kernels.Spec]) -> None:
    given = case(rows=9).to(torch.float32)
    assert isinstance(given.teacher, Projection)
    teacher = logits(given.teacher)
    teacher[3, 2] = torch.nan
    terms: list[RowTerm] = [Tempered(jsd, V), Nll()]
    loss, values, gradients = dense_pass.fused(replace(given, teacher=teacher), terms, [0.7, 0.4])
    assert loss.isfinite()
    assert values[0, 3].isnan()
    assert gradients[0] is not None
    assert not gradients[0][3].any()
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert launches


def test_it_is_taken_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda device: True)
    gpu = torch.device("cuda")
    assert launching.on_chip(gpu, torch.bfloat16)
    assert not launching.on_chip(gpu, torch.float64)
    assert not launching.on_chip(torch.device("cpu"), torch.float32)
    monkeypatch.setenv("LLM_DISTILL_TRITON", "0")
    assert not launching.on_chip(gpu, torch.bfloat16)


def _float(found: dense_pass.Found) -> dense_pass.Found:
    """In fp32, to compare with."""
    loss, values, gradients = found
    return loss.float(), values.float(), [None if g is None else g.float() for g in gradients]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def targets() -> dict[str, Any]:
    ids = meta(300, 5, dtype=torch.long)
    return {
        "projection": Projection(meta(300, 8), meta(1000, 8)),
        "dense": meta(300, 1000),
        "top k": TopK(ids, meta(300, 5), meta(300)),
        "counts": Counts(ids, ids, 50),
    }


@pytest.mark.parametrize("teacher", targets())
@pytest.mark.parametrize(
    "losses",
    [[forward_kl], [jsd, reverse_kl], [adaptive_kl, decoupled], [dense_pass.two_lines]],
    ids=["one", "two", "with labels", "a user's"],
)
def test_nothing_is_asked_of_another_device(
    monkeypatch: pytest.MonkeyPatch, teacher: str, losses: list[Callable[..., Tensor]]
) -> None:
    """Meta tensors have shapes and no numbers: whoever asks for one fails, as a GPU would wait."""
    if teacher == "counts":
        losses = [forward_kl]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    features, weight = meta(300, 16).requires_grad_(), meta(1000, 16).requires_grad_()
    terms: list[RowTerm] = [*map(Tempered, losses), Nll()]
    loss, values = fused.head_pass(
        Projection(features, weight, None, Finish(softcap=3.0)),
        targets()[teacher],
        meta(300, dtype=torch.long),
        terms,
        meta(len(terms), dtype=torch.float32),
        measures=[Alone(entropy), Nll()],
        chunk=128,
    )
    loss.backward()
    assert values.shape == (len(terms) + 2, 300)
    assert features.grad is not None
    assert weight.grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("triton", ["1", "0"])
@pytest.mark.parametrize(
    "losses",
    [[forward_kl], [jsd], [decoupled], [jsd, reverse_kl], [adaptive_kl], [dense_pass.two_lines]],
    ids=lambda losses: " ".join(loss.__name__ for loss in losses),
)
@pytest.mark.parametrize("teacher", ["projection", "top k"])
@pytest.mark.parametrize("moving", [False, True])
def test_a_gpu_is_never_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    triton: str,
    losses: list[Callable[..., Tensor]],
    teacher: str,
    moving: bool,
) -> None:
    monkeypatch.setenv("LLM_DISTILL_TRITON", triton)
    features = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    whole = Projection(features.detach(), weight.detach() + 0.1)
    target = whole if teacher == "projection" else TopK.of(logits(whole), 16)
    labels = torch.randint(1000, (300,), device="cuda")
    mix = torch.tensor(0.5, device="cuda") if moving else None
    terms: list[RowTerm] = [Nll(), *(Tempered(loss, 1000, 2.0, mix=mix) for loss in losses)]
    shares = torch.full((len(terms),), 1 / 300, device="cuda")
    student, beside = Projection(features, weight), [Alone(entropy)]

    def run() -> None:
        fused.head_pass(student, target, labels, terms, shares, measures=beside)[0].backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_several_teachers(launches: list[kernels.Spec], temperature: float) -> None:
    """Combined by PyTorch for a chunk, at the temperature of the term, then as one teacher."""
    from tests.losses.test_blending import WEIGHTS, gradients, parts, student, switch
    from tests.losses.test_blending import V as TOKENS

    term = Tempered(forward_kl, TOKENS, temperature, factor=temperature**2)
    terms: list[RowTerm] = [term, Nll()]
    singles = torch.float32, torch.float64
    teachers: dict[str, Any] = {
        "blend": lambda dtype: Blend(parts(dtype=dtype), WEIGHTS, confidence="label"),
        "switch": lambda dtype: switch(dtype)[0],
    }
    for teacher in teachers.values():
        few, whole = (
            gradients(student(dtype=dtype), teacher(dtype), terms, [0.7, 0.4], 4)
            for dtype in singles
        )
        assert launches
        assert all(spec.temperature == temperature for spec in launches)
        launches.clear()
        for ours, expected in zip(few, whole, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
