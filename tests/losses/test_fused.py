"""The head pass against the dense computation of the same thing by plain autograd."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_distill.losses import divergences, reweighted
from llm_distill.losses.fused import Teacher, head_pass, rows_per_chunk
from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.rowwise import Nll, RowTerm, Tempered
from llm_distill.losses.sparse import Counts, TopK, coarsen, sampled_kl

N, D, E, V, CHUNK = 23, 5, 7, 11, 4

LOSSES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": divergences.jsd,
    "jsd .1": partial(divergences.jsd, beta=0.1),
    "jsd .9 normalized": partial(divergences.jsd, beta=0.9, normalize_ends=True),
    "jsd 0 normalized": partial(divergences.jsd, beta=0.0, normalize_ends=True),
    "jsd 1 normalized": partial(divergences.jsd, beta=1.0, normalize_ends=True),
    "skew_forward_kl": divergences.skew_forward_kl,
    "skew_forward_kl .7": partial(divergences.skew_forward_kl, alpha=0.7),
    "skew_reverse_kl": divergences.skew_reverse_kl,
    "skew_reverse_kl .7": partial(divergences.skew_reverse_kl, alpha=0.7),
    "tvd": divergences.tvd,
    "adaptive_kl": reweighted.adaptive_kl,
    "adaptive_kl .9": partial(reweighted.adaptive_kl, mu=0.9),
    "alpha_beta": reweighted.alpha_beta,
    "alpha_beta 1 0": partial(reweighted.alpha_beta, alpha=1.0, beta=0.0),
    "alpha_beta 0 1": partial(reweighted.alpha_beta, alpha=0.0, beta=1.0),
    "alpha_beta .5 0": partial(reweighted.alpha_beta, alpha=0.5, beta=0.0),
    "alpha_beta 0 .5": partial(reweighted.alpha_beta, alpha=0.0, beta=0.5),
    "alpha_beta .5 -.5": partial(reweighted.alpha_beta, alpha=0.5, beta=-0.5),
    "alpha_beta 0 0": partial(reweighted.alpha_beta, alpha=0.0, beta=0.0),
    "todi": reweighted.todi,
    "decoupled": reweighted.decoupled,
}


def unsure(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """Any row function of a user's own: how far the entropy is from the teacher's, cubed."""
    assert teacher is not None
    entropies = [-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in (student, teacher)]
    return (entropies[0] - entropies[1]).pow(3)


def two_lines(student: Tensor, teacher: Tensor) -> Tensor:
    """A user's own divergence."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


MIXED: tuple[RowTerm, ...] = (
    Nll(),
    Tempered(divergences.forward_kl, V, temperature=2.0, factor=4.0),
    Tempered(partial(divergences.jsd, beta=0.3), V),
    unsure,
    Tempered(two_lines, V - 2, temperature=1.5),
)
SHARES = (0.1, 2.0, 0.0, 0.7, 0.3)


@dataclass(frozen=True)
class Given:
    """A student, its teacher and the labels of some rows."""

    student: Projection
    teacher: Teacher | None
    labels: Tensor

    def to(self, dtype: torch.dtype) -> "Given":
        """The same numbers, rounded to a dtype."""
        student, teacher = moved(self.student, dtype), self.teacher
        teacher = moved(teacher, dtype) if isinstance(teacher, Projection) else teacher
        return Given(student, teacher, self.labels)


def moved(model: Projection, dtype: torch.dtype) -> Projection:
    leaves = (None if t is None else t.detach().to(dtype) for t in (model.features, model.bias))
    features, bias = leaves
    assert features is not None
    return Projection(features, model.weight.detach().to(dtype), bias, model.finish)


def case(
    *,
    rows: int = N,
    bias: bool = True,
    width: int = D,
    vocabulary: int = V,
    wider: int = 2,
    student: Finish | None = None,
    teacher: Finish | None = None,
) -> Given:
    """Logits that vary: every gradient that is tested is far from 0."""
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = Projection(
        tensor(rows, width), tensor(vocabulary, width), tensor(vocabulary) if bias else None
    )
    other = Projection(tensor(rows, E), tensor(vocabulary + wider, E))
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return Given(
        replace(own, finish=student or Finish()), replace(other, finish=teacher or Finish()), labels
    )


def logits(model: Projection) -> Tensor:
    return model.finish(F.linear(model.features, model.weight, model.bias))


Found = tuple[Tensor, Tensor, list[Tensor | None]]


def fused(
    given: Given,
    terms: Sequence[RowTerm],
    shares: Sequence[float] | Tensor,
    *,
    chunk: int | None = CHUNK,
    upstream: float = 1.0,
    frozen: Sequence[str] = (),
) -> Found:
    """Loss, values, and gradients of features, weight and bias."""
    student, leaves = leafed(given.student, frozen)
    wide = torch.float64 if student.features.dtype == torch.float64 else torch.float32
    factors = torch.as_tensor(shares, dtype=wide)
    loss, values = head_pass(student, given.teacher, given.labels, terms, factors, chunk=chunk)
    (loss * upstream).backward()
    return loss.detach(), values, [None if t is None else t.grad for t in leaves]


def dense(
    given: Given,
    terms: Sequence[RowTerm],
    shares: Sequence[float] | Tensor,
    *,
    upstream: float = 1.0,
    frozen: Sequence[str] = (),
) -> Found:
    """All rows at once in float64, differentiated by autograd."""
    given = given.to(torch.float64)
    student, leaves = leafed(given.student, frozen)
    z, t = logits(student), given.teacher
    t = logits(t) if isinstance(t, Projection) else t
    values = torch.stack([value_of(term, z, t, given.labels) for term in terms])
    loss = (torch.as_tensor(shares, dtype=values.dtype) * values.sum(1)).sum()
    (loss * upstream).backward()
    return loss.detach(), values.detach(), [None if t is None else t.grad for t in leaves]


def value_of(term: RowTerm, z: Tensor, teacher: Any, labels: Tensor) -> Tensor:
    """A term on whole logits; on a sparse target, on coarse ones."""
    if isinstance(term, Nll) or not isinstance(teacher, TopK | Counts):
        return term(z, teacher, labels)
    assert isinstance(term, Tempered)
    if isinstance(teacher, Counts):
        return term.factor * sampled_kl(z, teacher)
    same = teacher.ids == labels[:, None]
    place = torch.where(same.any(-1), same.long().argmax(-1), teacher.ids.shape[1])
    coarse = coarsen(z, teacher.ids), teacher.targets().double()
    return replace(term, width=None)(*coarse, place)


def leafed(model: Projection, frozen: Sequence[str]) -> tuple[Projection, list[Tensor | None]]:
    """The model with leaves for gradients."""
    leaves: dict[str, Tensor | None] = {}
    for name in ("features", "weight", "bias"):
        value = getattr(model, name)
        leaves[name] = None if value is None else value.detach().clone()
        if value is not None and name not in frozen:
            leaves[name] = value.detach().clone().requires_grad_()
    given: dict[str, Any] = dict(leaves)
    return Projection(**given, finish=model.finish), list(leaves.values())


def assert_same(found: Found, expected: Found, bound: float = 1e-12) -> None:
    """Value, values and every gradient; and there is something to compare."""
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def check(given: Given, terms: Sequence[RowTerm], shares: Sequence[float], **options: Any) -> Found:
    chunk = options.pop("chunk", CHUNK)
    found = fused(given, terms, shares, chunk=chunk, **options)
    assert_same(found, dense(given, terms, shares, **options))
    return found


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    assert float(expected.norm()) > 1e-6
    return float((found.double() - expected.double()).norm() / expected.double().norm())


every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("labels", [True, False], ids=["with labels", "alone"])
def test_every_divergence(loss: Callable[..., Tensor], temperature: float, labels: bool) -> None:
    term = Tempered(loss, V, temperature, factor=temperature**2)
    terms: list[RowTerm] = [term, *([Nll()] if labels else [])]
    shares = [0.7, *([0.4] if labels else [])]
    _, values, gradients = check(case(), terms, shares)
    assert values[0].abs().max() > 1e-3
    assert all(g is not None and g.abs().max() > 1e-4 for g in gradients)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_divergence_on_a_top_k(loss: Callable[..., Tensor], temperature: float) -> None:
    given = case()
    assert isinstance(given.teacher, Projection)
    target = TopK.of(logits(given.teacher)[:, :V], 4)
    check(replace(given, teacher=target), [Tempered(loss, V, temperature), Nll()], [0.7, 0.4])


@every_loss
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_every_divergence_in_less_than_double(
    loss: Callable[..., Tensor], dtype: torch.dtype, most: float, sparse: bool
) -> None:
    """Against float64 from the same rounded inputs: the matrix products are in `dtype`."""
    given = case(rows=64, width=16, vocabulary=97).to(dtype)
    if sparse:
        assert isinstance(given.teacher, Projection)
        target = TopK.of(logits(moved(given.teacher, torch.float64))[:, :97], 12)
        given = replace(given, teacher=target)
    terms: list[RowTerm] = [Tempered(loss, 97, 1.5), Nll()]
    found, expected = fused(given, terms, [0.7, 0.4]), dense(given, terms, [0.7, 0.4])
    # Signs flip where p is about q.
    most *= 4 if loss is divergences.tvd and dtype != torch.float32 else 1
    assert found[0].dtype == found[1].dtype == torch.float32
    assert relative_error(found[1], expected[1]) < most
    for one, other in zip(found[2], expected[2], strict=True):
        assert one is not None
        assert one.dtype == dtype
        assert relative_error(one, other) < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"])
def test_half_precision_is_exact_for_its_logits(name: str, dtype: torch.dtype) -> None:
    """Against an fp32 softmax of these logits, its slope rounded as the products take it."""
    given = case(rows=64, width=64, vocabulary=997, bias=False, wider=0).to(dtype)
    assert isinstance(given.teacher, Projection)
    z, t = (F.linear(m.features, m.weight).double() for m in (given.student, given.teacher))
    z.requires_grad_()
    LOSSES[name](z, t).sum().backward()
    assert z.grad is not None
    slope = z.grad.to(dtype).double()
    expected = slope @ given.student.weight.double(), slope.T @ given.student.features.double()
    found = fused(given, [Tempered(LOSSES[name])], [1.0], chunk=64)[2]
    for one, other in zip(found, expected, strict=False):
        assert relative_error(one, other.to(dtype)) < 1e-3


@pytest.mark.parametrize("chunk", [1, CHUNK, N - 1, N, N + 9, None])
def test_any_chunk_equals_the_dense_computation(chunk: int | None) -> None:
    check(case(), MIXED, SHARES, chunk=chunk)


def test_blocks_smaller_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_distill.losses.fused.BLOCK", {"cpu": 3 * (V + 2), "cuda": 1})
    check(case(), MIXED, SHARES, chunk=8)


@pytest.mark.parametrize("cut", [V, V - 3])
@pytest.mark.parametrize("wider", [2, 0, -2])
def test_vocabularies_of_other_sizes(cut: int, wider: int) -> None:
    common = min(cut, V + wider)
    terms: list[RowTerm] = [Tempered(divergences.jsd, common), Tempered(two_lines, common), Nll()]
    check(case(wider=wider), terms, [0.7, 0.2, 0.4])


FINISHES = [Finish(), Finish(scale=0.25), Finish(softcap=3.0), Finish(scale=2.0, softcap=3.0)]


@pytest.mark.parametrize("student", FINISHES, ids=str)
@pytest.mark.parametrize("teacher", [FINISHES[0], FINISHES[3]], ids=str)
@pytest.mark.parametrize("terms", [MIXED, MIXED[1:2], MIXED[:3]], ids=["mixed", "one", "closed"])
def test_scaled_and_capped_heads(
    student: Finish, teacher: Finish, terms: Sequence[RowTerm]
) -> None:
    check(case(student=student, teacher=teacher), terms, SHARES[: len(terms)])


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "decoupled"])
def test_a_moving_target(mix: float, temperature: float, name: str) -> None:
    moving = torch.tensor(mix, dtype=torch.float64)
    term = Tempered(LOSSES[name], V, temperature, mix=moving)
    check(case(), [term], [0.7])
    check(case(), [term, *MIXED], [0.7, *SHARES])
    check(case(student=FINISHES[3]), [term, Nll()], [0.7, 0.4])
    teacher = case().teacher
    assert isinstance(teacher, Projection)
    check(replace(case(), teacher=TopK.of(logits(teacher)[:, :V], 4)), [term], [0.7])


def test_a_moving_target_at_the_start_is_the_student() -> None:
    term = Tempered(divergences.forward_kl, V, mix=torch.tensor(0.0))
    _, values, gradients = fused(case(), [term], [1.0])
    assert values.abs().max() < 1e-14
    assert all(g is not None and g.abs().max() < 1e-14 for g in gradients)


def test_a_teacher_of_whole_logits_is_not_overwritten() -> None:
    given = case()
    assert isinstance(given.teacher, Projection)
    teacher = logits(given.teacher)
    kept = teacher.clone()
    check(replace(given, teacher=teacher), MIXED, SHARES)
    assert torch.equal(teacher, kept)


def test_nothing_given_is_overwritten() -> None:
    given = case()
    before = [t.clone() for t in tensors(vars(given.student)) + tensors(vars(given.teacher))]
    fused(given, MIXED, SHARES)
    after = tensors(vars(given.student)) + tensors(vars(given.teacher))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_sampled_tokens() -> None:
    given = case()
    assert isinstance(given.teacher, Projection)
    generator = torch.Generator().manual_seed(1)
    target = Counts.sample(logits(given.teacher)[:, :V], 20, generator=generator)
    term = Tempered(divergences.forward_kl, V, factor=2.0)
    check(replace(given, teacher=target), [term, Nll()], [0.7, 0.4])


@pytest.mark.parametrize(
    "term",
    [
        Tempered(divergences.jsd, V),
        Tempered(temperature=2.0),
        Tempered(mix=torch.tensor(0.5)),
    ],
)
def test_sampled_tokens_serve_forward_kl_alone(term: Tempered) -> None:
    target = Counts.sample(torch.randn(N, V), 5)
    with pytest.raises(ValueError, match=r"unbiased for forward_kl at temperature 1"):
        fused(replace(case(), teacher=target), [term], [1.0])


def test_a_sparse_teacher_has_no_whole_logits() -> None:
    target = TopK.of(torch.randn(N, V), 3)
    with pytest.raises(ValueError, match=r"TopK targets, and .*unsure.* reads its whole logits"):
        fused(replace(case(), teacher=target), [unsure], [1.0])


def test_terms_that_need_no_teacher() -> None:
    check(replace(case(), teacher=None), [Nll(), Nll()], [1.0, 0.5])


def test_a_divergence_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        fused(replace(case(), teacher=None), [Tempered(two_lines)], [1.0])


@pytest.mark.parametrize("shares", [(0.0,) * 5, (1e-9, 0, 3e-9, 0, 0), (1e6, 1, 0, 1e-6, 1)])
def test_shares_of_any_size(shares: tuple[float, ...]) -> None:
    check(case(), MIXED, shares)


def test_values_are_of_each_row_and_detached() -> None:
    given = case()
    student, _ = leafed(given.student, ())
    shares = torch.tensor(SHARES, dtype=torch.float64)
    loss, values = head_pass(student, given.teacher, given.labels, MIXED, shares)
    assert loss.requires_grad
    assert not values.requires_grad
    assert values.shape == (5, N)
    torch.testing.assert_close(loss.detach(), (shares * values.sum(1)).sum())


def test_an_upstream_factor_scales_the_gradients() -> None:
    check(case(), MIXED, SHARES, upstream=3.0)


def test_gradients_reach_what_is_below_the_features() -> None:
    gradients = []
    for compute in (head_pass, None):
        given = case()
        below = torch.eye(D, dtype=torch.float64).requires_grad_()
        student = replace(given.student, features=torch.tanh(given.student.features @ below))
        shares = torch.tensor(SHARES, dtype=torch.float64)
        if compute is not None:
            loss, _ = compute(student, given.teacher, given.labels, MIXED, shares, chunk=CHUNK)
        else:
            assert isinstance(given.teacher, Projection)
            z, t = logits(student), logits(given.teacher)
            loss = sum(s * term(z, t, given.labels).sum() for s, term in zip(shares, MIXED))  # noqa: B905
        (loss + below.sum()).backward()
        gradients.append(below.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_tied_weight_gets_both_gradients() -> None:
    gradients = []
    for whole in (False, True):
        given = case(bias=False)
        weight = given.student.weight.clone().requires_grad_()
        student = Projection(F.embedding(torch.arange(N) % V, weight), weight)
        shares = torch.tensor([0.4, 0.7], dtype=torch.float64)
        terms: list[RowTerm] = [Nll(), Tempered(divergences.forward_kl, V)]
        if whole:
            assert isinstance(given.teacher, Projection)
            z, t = logits(student), logits(given.teacher)
            found = torch.stack([term(z, t, given.labels).sum() for term in terms])
            (shares * found).sum().backward()
        else:
            head_pass(student, given.teacher, given.labels, terms, shares, chunk=CHUNK)[
                0
            ].backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "frozen", [("features",), ("weight",), ("bias",), ("weight", "bias"), ("features", "bias")]
)
def test_frozen_inputs_get_no_gradient(frozen: tuple[str, ...]) -> None:
    gradients = check(case(), MIXED, SHARES, frozen=frozen)[2]
    names = ("features", "weight", "bias")
    assert [n for n, g in zip(names, gradients, strict=True) if g is None] == list(frozen)


def test_no_rows_give_zeros_with_a_graph() -> None:
    loss, values, gradients = fused(case(rows=0), MIXED, SHARES)
    assert loss.item() == 0.0
    assert values.shape == (5, 0)
    found = [None if g is None else g.tolist() for g in gradients]
    assert found == [[], [[0.0] * D] * V, [0.0] * V]


# Rows at fault


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_hidden_state_that_is_no_number_spoils_no_head(broken: float) -> None:
    """The row's slope is 0, and 0 times NaN is NaN."""
    given = case(student=Finish(softcap=3.0))
    features = given.student.features.clone()
    features[3] = broken
    others = torch.arange(N) != 3
    assert isinstance(given.teacher, Projection)
    teacher = logits(given.teacher)
    spoilt = replace(given, student=replace(given.student, features=features), teacher=teacher)
    sound = Given(
        replace(given.student, features=features[others]), teacher[others], given.labels[others]
    )
    gradients = fused(spoilt, MIXED[:3], SHARES[:3])[2]
    expected = dense(sound, MIXED[:3], SHARES[:3])[2]
    if broken != broken:  # beyond a soft cap infinity is a number like others
        torch.testing.assert_close(gradients[1:], expected[1:], rtol=1e-12, atol=1e-12)
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_no_number_counts_nothing(broken: float) -> None:
    """A teacher that overflows must not destroy the student: other rows train on."""
    given = case()
    assert isinstance(given.teacher, Projection)
    teacher = logits(given.teacher)
    teacher[3, 2] = broken
    loss, values, gradients = fused(replace(given, teacher=teacher), MIXED[:3], SHARES[:3])
    assert values[1:, 3].isnan().all()
    others = torch.arange(N) != 3
    sound = Given(
        replace(given.student, features=given.student.features[others]),
        teacher[others],
        given.labels[others],
    )
    expected = dense(sound, MIXED[:3], SHARES[:3])
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    assert gradients[0] is not None
    assert not gradients[0][3].any()
    torch.testing.assert_close(gradients[0][others], expected[2][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1:], expected[2][1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_divergence_counts_nothing(dtype: torch.dtype) -> None:
    given = case().to(dtype)
    assert isinstance(given.teacher, Projection)
    assert given.student.bias is not None
    given.student.bias[4] = -math.inf
    loss, values, gradients = fused(given, [Tempered(divergences.forward_kl, V)], [1.0])
    assert (values > 1e20).all()
    assert loss.item() == 0.0
    assert not any(g is not None and g.any() for g in gradients)


@every_loss
def test_tokens_both_forbid_do_not_exist(loss: Callable[..., Tensor]) -> None:
    """As padding of a vocabulary, written as a bias of -inf."""
    given = case(wider=0)
    assert isinstance(given.teacher, Projection)
    assert given.student.bias is not None
    allowed = torch.arange(V) < V - 3
    kept = Given(
        replace(
            given.student,
            weight=given.student.weight[allowed],
            bias=given.student.bias[allowed],
        ),
        replace(given.teacher, weight=given.teacher.weight[allowed]),
        given.labels.clamp_max(V - 4),
    )
    given.student.bias[~allowed] = -math.inf
    barred = torch.zeros(V, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    given = Given(given.student, replace(given.teacher, bias=barred), kept.labels)
    terms: list[RowTerm] = [Tempered(loss, V, 2.0), Nll()]
    found, expected = fused(given, terms, [0.7, 0.4]), dense(kept, terms, [0.7, 0.4])
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2][0], expected[2][0], rtol=1e-10, atol=1e-10)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype)
    given = Given(
        Projection(torch.eye(3, dtype=dtype), student.T.clone()), teacher, torch.arange(3)
    )
    loss_value, values, gradients = fused(given, [Tempered(loss)], [1.0])
    assert loss_value.isfinite()
    assert all(g is None or g.isfinite().all() for g in gradients)
    if loss != LOSSES["alpha_beta .5 -.5"]:  # its true value is e^5000
        assert values.isfinite().all()
        assert abs(values[0, 1].item()) < 1e-6


@every_loss
def test_at_identity_values_and_gradients_vanish(loss: Callable[..., Tensor]) -> None:
    """In fp32: |gradient| of a row's logits below 1e-6, value below 1e-5."""
    torch.manual_seed(0)
    z = 4 * torch.randn(50, 300)
    given = Given(Projection(torch.eye(50), z.T.clone()), z, torch.randint(300, (50,)))
    _, values, gradients = fused(given, [Tempered(loss)], [1.0], chunk=50)
    # Divided by beta (1 - beta).
    most = 1e-5 if getattr(loss, "keywords", {}).get("normalize_ends") else 2e-6
    assert values.abs().max() < most
    assert gradients[1] is not None
    assert gradients[1].abs().max() < 1e-6


# Evaluation, memory, autograd's rules


class Seen:
    """A row function that remembers what it was given."""

    def __init__(self) -> None:
        self.differentiable: list[bool] = []
        self.dtypes: set[torch.dtype] = set()
        self.autocast: set[bool] = set()

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        self.differentiable.append(student.requires_grad)
        self.dtypes.add(student.dtype)
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy(student, labels, reduction="none")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradients(mode: Callable[[], Any]) -> None:
    seen, given = Seen(), case(rows=97)
    student, _ = leafed(given.student, ())
    terms: list[RowTerm] = [seen, *MIXED]
    shares = torch.ones(len(terms), dtype=torch.float64)
    with mode(), Largest() as largest:
        loss, values = head_pass(student, given.teacher, given.labels, terms, shares, chunk=CHUNK)
    assert seen.differentiable == [False] * math.ceil(97 / CHUNK)
    assert not loss.requires_grad
    assert largest.shapes.isdisjoint({(V, D), (97, D)})
    expected = dense(given, terms, shares)[1]
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_nothing_to_train_makes_no_gradients() -> None:
    seen, given = Seen(), case()
    loss, _ = head_pass(given.student, None, given.labels, [seen], torch.ones(1).double())
    assert not any(seen.differentiable)
    assert not loss.requires_grad


def test_a_function_without_a_slope() -> None:
    constant: RowTerm = lambda s, t, labels: labels.to(s.dtype)  # noqa: E731
    loss, values, gradients = fused(case(), [constant], [2.0])
    assert loss.item() == 2 * values.sum().item() == 2 * case().labels.sum().item()
    assert all(g is not None and not g.any() for g in gradients)
    check(case(), [constant, MIXED[1]], [2.0, 3.0])


class Largest(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations allocate, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        self.shapes |= {
            tuple(t.shape) for t in tensors(made) if t.untyped_storage().data_ptr() not in known
        }
        return made


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    rows, width, chunk = 512, 2, 16
    given = case(rows=rows, width=width)
    with Largest() as largest:
        fused(given, MIXED, SHARES, chunk=chunk)
    numbers = max(math.prod(shape) for shape in largest.shapes)
    assert numbers <= max(rows * E, 5 * rows)  # the features, and the values
    assert (chunk, V) in largest.shapes
    assert max(shape[0] for shape in largest.shapes if shape[1:] in ((V,), (V + 2,))) == chunk


def test_the_backward_runs_once() -> None:
    given = case()
    student, _ = leafed(given.student, ())
    shares = torch.tensor(SHARES).double()
    loss, _ = head_pass(student, given.teacher, given.labels, MIXED, shares)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"the head pass has one backward.*run the forward again"
    ):
        loss.backward()


def test_second_derivatives_are_no_silent_zeros() -> None:
    given = case()
    student, _ = leafed(given.student, ())
    shares = torch.tensor(SHARES).double()
    loss, _ = head_pass(student, given.teacher, given.labels, MIXED, shares)
    slope = torch.autograd.grad(loss, student.features, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


# Dtypes


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_under_autocast_the_loss_and_the_gradients_stay_fp32(
    dtype: torch.dtype, most: float
) -> None:
    seen, given = Seen(), case().to(torch.float32)
    terms: list[RowTerm] = [seen, *MIXED]
    shares = [0.2, *SHARES]
    with torch.autocast("cpu", dtype):
        found = fused(given, terms, shares)
    assert seen.dtypes == {torch.float32}
    assert seen.autocast == {False}
    assert found[0].dtype == found[1].dtype == torch.float32
    expected = dense(given, terms, shares)
    assert relative_error(found[0], expected[0]) < most
    for one, other in zip(found[2], expected[2], strict=True):
        assert one is not None
        assert one.dtype == torch.float32
        assert relative_error(one, other) < most


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(case(), MIXED, SHARES)
    assert_same(found, dense(case(), MIXED, SHARES))


def test_tiny_shares_do_not_underflow_in_fp16() -> None:
    """1e-9 is 0 in fp16: slopes are made for shares of order one, and scaled in fp32."""
    shares = [1e-9 * share for share in SHARES]
    given = case().to(torch.float32)
    with torch.autocast("cpu", torch.float16):
        found = fused(given, MIXED, shares)
    expected = dense(given, MIXED, shares)
    for one, other in zip(found[2], expected[2], strict=True):
        assert other is not None
        assert one is not None
        assert relative_error(one * 1e9, other * 1e9) < 3e-3


def test_a_tiny_share_and_a_loss_scale_cancel_in_fp16() -> None:
    """As a gradient scaler does: gradients in fp16 are those of the scaled loss."""
    given = case().to(torch.float16)
    found = fused(given, MIXED, [1e-9 * share for share in SHARES], upstream=1e9)
    expected = fused(given, MIXED, SHARES)
    for one, other in zip(found[2], expected[2], strict=True):
        assert relative_error(one, other) < 1e-3


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_slopes_of_a_flat_softmax_do_not_underflow_in_fp16(name: str) -> None:
    """Of 40000 tokens that are alike each has a slope of about 1e-6, 17 of fp16's least number."""
    given = case(rows=8, width=32, vocabulary=40_000, bias=False, wider=0)
    assert isinstance(given.teacher, Projection)
    flat = Given(
        replace(given.student, weight=0.01 * given.student.weight),
        replace(given.teacher, weight=0.01 * given.teacher.weight),
        given.labels,
    )
    flat = flat.to(torch.float16).to(torch.float32)
    terms = [Tempered(LOSSES[name])]
    with torch.autocast("cpu", torch.float16):
        found = fused(flat, terms, [1.0], chunk=8)[2]
    for one, other in zip(found, dense(flat, terms, [1.0])[2], strict=True):
        if one is not None and other is not None:
            error = (one.double() - other).norm() / other.norm()
            assert error < 2e-3


def test_the_factor_is_not_rounded_to_the_gradients_dtype() -> None:
    """1.003 is 1 in bf16: every gradient would be 0.3 % too small."""
    given = case(rows=200, width=40).to(torch.bfloat16)
    plain = fused(given, [Nll()], [1.0])[2]
    for options in ({"shares": [1.003]}, {"shares": [1.0], "upstream": 1.003}):
        scaled = fused(given, [Nll()], **options)[2]
        for one, other in zip(scaled, plain, strict=True):
            assert one is not None
            assert other is not None
            ratio = float((one.double() * other.double()).sum() / other.double().square().sum())
            assert ratio == pytest.approx(1.003, abs=5e-4)


def test_many_chunks_are_summed_in_fp32() -> None:
    """A sum kept in bf16 would stop growing once it is 256 times what is added."""
    rows = 1500
    given = case(rows=rows).to(torch.bfloat16)
    found = fused(given, [Nll()], [1.0], chunk=1)
    once = fused(given, [Nll()], [1.0], chunk=rows)
    for one, other in zip(found[2], once[2], strict=True):
        assert relative_error(one, other) < 1e-2


def test_rows_per_chunk() -> None:
    assert rows_per_chunk(torch.float32, "cpu") == 256
    assert rows_per_chunk(torch.bfloat16, "cpu") == 512
    assert rows_per_chunk(torch.bfloat16, "cuda") == 2048
    assert rows_per_chunk(torch.bfloat16, "cuda", frozen=True) == 512
    free = 1 << 30  # an eighth of it holds two chunks of 512 rows of 2^15 halves
    assert rows_per_chunk(torch.bfloat16, "cuda", vocabulary=1 << 15, free=free) == 1024
    assert rows_per_chunk(torch.float32, "cpu", vocabulary=1 << 17, free=1 << 20) == 16
