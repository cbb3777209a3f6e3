"""One chunk of logits: values and gradient in their place, in whatever way they are computed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill.losses import decoupled, forward_kl, jsd, reverse_kl, todi, tvd
from llm_distill.losses.pairs import Scratch
from llm_distill.losses.planning import plan
from llm_distill.losses.projection import Finish
from llm_distill.losses.rowwise import Nll, RowTerm, Tempered
from llm_distill.losses.scoring import INFINITE, Job, Side, Target, faulty, score
from llm_distill.losses.sparse import Counts, TopK
from tests.losses.catalogue import every_loss, logits

N, V = 7, 11
LABELS = torch.tensor([0, 3, 5, 7, 9, 10, 3])
SEVERAL: tuple[RowTerm, ...] = (
    Tempered(jsd, temperature=2.0, factor=4.0),
    Nll(),
    Tempered(decoupled),
    Tempered(forward_kl),
    Tempered(reverse_kl, V - 3),
)
SHARES = (0.7, 0.4, 0.2, -0.3, 0.5)


class Buffered(Job):
    """A job whose gradient grows beside the logits."""

    @property
    def direct(self) -> bool:
        return False


def job_for(
    terms: Sequence[RowTerm],
    shares: Sequence[Tensor | float],
    target: Target,
    *,
    kind: type[Job] = Job,
    rows: int = 3,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Job:
    return kind(
        plan=plan(terms, V, target),
        shares=shares,
        student=changes.pop("student", Side(owned=True)),
        teacher=changes.pop("teacher", Side()),
        wanted=changes.pop("wanted", True),
        scratch=Scratch(rows * (V + 2), dtype, torch.device("cpu")),
        rows=rows,
    )


def run(
    terms: Sequence[RowTerm],
    shares: Sequence[Tensor | float],
    z: Tensor,
    target: Target,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Values `[K, N]` and the gradient."""
    options.setdefault("dtype", torch.float64 if z.dtype == torch.float64 else torch.float32)
    job = job_for(terms, shares, target, **options)
    slope = z.detach().clone()
    values = torch.full((len(terms), len(z)), math.nan, dtype=job.scratch.dtype)
    score(slope, target, LABELS[: len(z)], values, job)
    return values, slope


def dense(
    terms: Sequence[RowTerm],
    shares: Sequence[float],
    z: Tensor,
    teacher: Tensor | None,
    finish: Finish = Finish(),  # noqa: B008  (frozen)
) -> tuple[Tensor, Tensor]:
    """The same by autograd on the whole."""
    z = z.detach().requires_grad_()
    values = torch.stack([term(finish(z), teacher, LABELS[: len(z)]) for term in terms])
    summed = sum(s * v.sum() for s, v in zip(shares, values, strict=False))
    assert isinstance(summed, Tensor)
    return values.detach(), torch.autograd.grad(summed, z)[0]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.fixture
def both() -> tuple[Tensor, Tensor]:
    student, teacher = logits(N, V)
    return student.detach(), teacher


Both = tuple[Tensor, Tensor]


@pytest.mark.parametrize("rows", [1, 2, N - 1, N, N + 5])
def test_blocks_of_any_size(both: Both, rows: int) -> None:
    found = run(SEVERAL, SHARES, *both, rows=rows)
    assert_same(found, dense(SEVERAL, SHARES, *both))
    # The same block by block, to the last bit: rows do not see each other.
    assert all(torch.equal(*pair) for pair in zip(found, run(SEVERAL, SHARES, *both), strict=True))


@every_loss
@pytest.mark.parametrize("more", [(), (Nll(),)], ids=["alone", "with labels"])
def test_the_gradient_may_grow_in_the_place_of_the_logits(
    both: Both, loss: Any, more: tuple[RowTerm, ...]
) -> None:
    terms: list[RowTerm] = [Tempered(loss), *more]
    shares = (0.7, 0.4)[: len(terms)]
    here = run(terms, shares, *both)
    beside = run(terms, shares, *both, kind=Buffered)
    assert all(torch.equal(*pair) for pair in zip(here, beside, strict=True))
    assert_same(here, dense(terms, shares, *both))


@pytest.mark.parametrize(
    ("terms", "finish", "expected"),
    [
        ([Tempered(jsd)], Finish(), True),
        ([Nll()], Finish(scale=2.0), True),
        ([Tempered(jsd), Nll()], Finish(), True),
        ([Tempered(jsd)], Finish(softcap=3.0), False),  # which needs the logits at the end
        ([Tempered(jsd), Tempered(tvd)], Finish(), False),
        ([Tempered(jsd, temperature=2.0), Nll()], Finish(), False),
        ([Tempered(jsd), Tempered(decoupled)], Finish(), False),
        ([Tempered(decoupled)], Finish(), True),
        ([], Finish(), False),
    ],
)
def test_when_one_look_at_the_logits_is_enough(
    both: Both, terms: list[RowTerm], finish: Finish, expected: bool
) -> None:
    assert job_for(terms, [], both[1], student=Side(finish)).direct is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [SEVERAL, SEVERAL[3:4]], ids=["several", "one"])
def test_halves_are_rounded_once_at_the_end(
    both: Both, dtype: torch.dtype, terms: Sequence[RowTerm]
) -> None:
    z, t = (side.to(dtype) for side in both)
    values, slope = run(terms, SHARES[: len(terms)], z, t)
    single = run(terms, SHARES[: len(terms)], z.float(), t.float(), kind=Buffered)
    assert values.dtype == torch.float32
    assert torch.equal(values, single[0])
    assert torch.equal(slope, single[1].to(dtype))


@pytest.mark.parametrize("terms", [SEVERAL, SEVERAL[3:4], SEVERAL[1:2]])
def test_shares_may_be_numbers_or_tensors(both: Both, terms: Sequence[RowTerm]) -> None:
    """The host does not know those on a GPU."""
    shares = SHARES[: len(terms)]
    on_device = [torch.tensor(share, dtype=torch.float64) for share in shares]
    assert_same(run(terms, on_device, *both), run(terms, shares, *both))


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0).double()], ids=["number", "tensor"])
@pytest.mark.parametrize("kind", [Job, Buffered])
def test_shares_of_zero(both: Both, zero: Tensor | float, kind: type[Job]) -> None:
    """Values are there, and the gradient is 0, whatever the buffers held."""
    for terms in (SEVERAL, SEVERAL[3:4], SEVERAL[1:2]):
        values, slope = run(terms, [zero] * len(terms), *both, kind=kind)
        assert values.isfinite().all()
        assert not slope.any()


# What is given


def test_what_is_not_owned_is_left_as_it_is(both: Both) -> None:
    z, t = both
    kept = t.clone()
    plain = run(SEVERAL, SHARES, z, t)
    assert torch.equal(t, kept)
    owned = run(SEVERAL, SHARES, z, t.clone(), teacher=Side(owned=True))
    lent = run(SEVERAL, SHARES, z, t, student=Side())
    for other in (owned, lent):
        assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))
    target = t.clone()
    run([Tempered(jsd)], [1.0], z, target, teacher=Side(owned=True))
    assert not torch.equal(target, kept)  # the work is done in its place


def test_finite_says_that_nothing_is_forbidden(both: Both) -> None:
    sure = Side(owned=True, finite=True)
    found = run(SEVERAL, SHARES, *both, student=sure, teacher=replace(sure, owned=False))
    assert all(torch.equal(*pair) for pair in zip(found, run(SEVERAL, SHARES, *both), strict=True))


def test_tokens_both_forbid_do_not_exist(both: Both) -> None:
    z, t = (side.clone() for side in both)
    z[:, 4] = t[:, 4] = -math.inf
    terms = SEVERAL[1:4]
    values, slope = run(terms, SHARES[1:4], z, t)
    kept = torch.arange(V) != 4
    assert not slope[:, 4].any()
    moved = torch.where(LABELS > 4, LABELS - 1, LABELS)
    expected = torch.stack([term(z[:, kept], t[:, kept], moved) for term in terms])
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("finish", [Finish(2.0), Finish(softcap=3.0), Finish(0.5, 3.0)], ids=str)
def test_the_gradient_is_that_of_the_product(both: Both, finish: Finish) -> None:
    for terms in (SEVERAL, SEVERAL[3:4], SEVERAL[1:2], SEVERAL[:1]):
        shares = SHARES[: len(terms)]
        found = run(terms, shares, *both, student=Side(finish, owned=True))
        assert_same(found, dense(terms, shares, *both, finish=finish))


def test_a_teacher_of_other_width(both: Both) -> None:
    z, t = both
    wider = torch.cat([t, 9 * torch.ones(N, 2)], -1)
    terms: list[RowTerm] = [Tempered(jsd, V), Nll()]
    assert_same(run(terms, SHARES[:2], z, wider), run(terms, SHARES[:2], z, t))
    terms = [Tempered(jsd, V - 2), Nll()]
    assert_same(run(terms, SHARES[:2], z, t[:, :-2]), dense(terms, SHARES[:2], z, t[:, :-2]))


def test_values_alone(both: Both) -> None:
    """Without a gradient to make, none is made: `z` holds no meaning afterwards."""
    values, _ = run(SEVERAL, SHARES, *both, wanted=False)
    torch.testing.assert_close(values, dense(SEVERAL, SHARES, *both)[0])


def test_no_target() -> None:
    z = logits(N, V)[0].detach()
    assert_same(
        run([Nll(), Nll()], [0.5, 0.2], z, None), dense([Nll(), Nll()], [0.5, 0.2], z, None)
    )


def test_sparse_targets_go_block_by_block(both: Both) -> None:
    z, t = both
    counts = Counts.sample(t, 5, generator=torch.Generator().manual_seed(0))
    for target, loss in ((TopK.of(t, 4), jsd), (counts, forward_kl)):
        terms: list[RowTerm] = [Tempered(loss, factor=2.0), Nll()]
        whole = run(terms, [0.7, 0.4], z, target, rows=N)
        assert_same(run(terms, [0.7, 0.4], z, target, rows=2), whole)
        assert whole[1].abs().max() > 1e-2


def test_a_sparse_plan_needs_a_sparse_target(both: Both) -> None:
    z, t = both
    job = job_for([Tempered()], [1.0], TopK.of(t, 4))
    with pytest.raises(TypeError, match="no sparse target"):
        score(z, None, LABELS, torch.zeros(1, N, dtype=torch.float64), job)


def test_a_loss_without_a_slope_on_a_sparse_target(both: Both) -> None:
    z, t = both
    values, slope = run([Tempered(lambda s, t: t.sum(-1))], [1.0], z, TopK.of(t, 4))
    assert values.isfinite().all()
    assert not slope.any()


# Rows at fault


def test_faulty() -> None:
    values = torch.tensor(
        [
            [0.0, math.nan, 1.0, math.inf, -math.inf, 2 * INFINITE, -2 * INFINITE, INFINITE / 2],
            [1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0, -1.0],
        ]
    )
    assert faulty(values).tolist() == [False] + [True] * 6 + [False]
    assert faulty(values[:0]).tolist() == [False] * 8


BROKEN = [("student", math.nan), ("student", math.inf), ("teacher", math.nan)]


@pytest.mark.parametrize(("side", "broken"), BROKEN)
@pytest.mark.parametrize("kind", [Job, Buffered])
def test_a_faulty_row_gets_no_gradient_and_harms_no_other(
    both: Both, side: str, broken: float, kind: type[Job]
) -> None:
    z, t = (tensor.clone() for tensor in both)
    (z if side == "student" else t)[3, 2] = broken
    others = torch.arange(N) != 3
    for terms in (SEVERAL, SEVERAL[3:4], SEVERAL[1:3]):
        shares = SHARES[: len(terms)]
        values, slope = run(terms, shares, z, t, kind=kind)
        sound = run(terms, shares, *both, kind=kind)
        assert faulty(values).tolist() == (~others).tolist()
        assert not slope[3].any()
        assert torch.equal(slope[others], sound[1][others])
        assert torch.equal(values[:, others], sound[0][:, others])


def test_an_infinite_value_is_a_fault_and_shows(both: Both) -> None:
    z, t = both
    t = t.clone()
    t[2, 5] = -math.inf
    values, slope = run([Tempered(reverse_kl)], [1.0], z, t)
    assert values[0, 2] > 1e20
    assert slope.any(-1).tolist() == [True, True, False, True, True, True, True]


# Terms behind the shares are measured


@pytest.mark.parametrize(
    "measure",
    [Tempered(todi), Tempered(decoupled), Nll(), Tempered(jsd, V - 3, temperature=2.0)],
    ids=["same softmax", "free", "labels", "another softmax"],
)
@pytest.mark.parametrize("kind", [Job, Buffered])
def test_measures_have_no_gradient(both: Both, measure: RowTerm, kind: type[Job]) -> None:
    trained: list[RowTerm] = [Tempered(forward_kl), Nll()]
    values, slope = run([*trained, measure], [0.7, 0.4], *both, kind=kind)
    alone = run(trained, [0.7, 0.4], *both, kind=kind)
    torch.testing.assert_close(slope, alone[1], rtol=1e-12, atol=1e-14)
    assert_same((values, slope), dense([*trained, measure], [0.7, 0.4], *both))


def test_measures_alone_leave_a_gradient_of_zero(both: Both) -> None:
    for terms in (SEVERAL, SEVERAL[3:4], SEVERAL[1:2]):
        values, slope = run(terms, [], *both)
        torch.testing.assert_close(values, dense(terms, [0.0], *both)[0])
        assert not slope.any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jsd, tvd, todi, decoupled])
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
def test_a_measure_never_makes_a_row_faulty(
    both: Both, broken: float, loss: Any, on_device: bool
) -> None:
    """A teacher that overflows is measured: the labels train on."""
    z, t = both
    t = t.clone()
    t[3, 2] = broken
    shares: list[Tensor | float] = [torch.tensor(0.4).double() if on_device else 0.4]
    values, slope = run([Nll(), Tempered(loss)], shares, z, t)
    assert_same((values[:1], slope), run([Nll()], shares, z, t))
    assert slope[3].any()
    if broken != -math.inf:
        assert values[1].isnan().tolist() == [k == 3 for k in range(N)]


def test_a_measure_on_a_sparse_target(both: Both) -> None:
    z, t = both
    terms: list[RowTerm] = [Nll(), Tempered(partial(jsd, beta=0.3))]
    values, slope = run(terms, [0.4], z, TopK.of(t, 4))
    torch.testing.assert_close(slope, run([Nll()], [0.4], z, None)[1])
    assert (values[1] > 0).all()
