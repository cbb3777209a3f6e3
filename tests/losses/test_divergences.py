"""Divergences against naive float64 loops, closed forms, limits and hostile logits."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses.divergences import (
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from llm_distill.losses.softmax import FLOOR
from llm_distill.objectives import HeadTerm, Logits
from llm_distill.signals import ModelSpec
from tests.losses.catalogue import (
    ALPHAS,
    BETAS,
    CASES,
    Case,
    Loss,
    every_case,
    every_loss,
    logits,
    slope,
)

LOSSES = {name: case.loss for name, case in CASES.items()}
SMOOTH = {name: case.loss for name, case in CASES.items() if not case.holds}


@every_case
def test_values_match_the_reference(case: Case) -> None:
    student, teacher = logits()
    expected = torch.from_numpy(case.naive(student.detach().numpy(), teacher.numpy()))
    assert expected.min() > 1e-3  # constant logits would make every formula right
    torch.testing.assert_close(
        case.loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-13
    )


@every_case
def test_gradients_match_the_reference(case: Case) -> None:
    student, teacher = logits()
    expected = case.gradient(student, teacher)
    assert expected.abs().amax(-1).min() > 1e-4
    torch.testing.assert_close(slope(case.loss, student, teacher), expected, rtol=1e-7, atol=1e-9)


@every_case
def test_fp32_matches_the_reference(case: Case) -> None:
    student, teacher = (z.detach().float() for z in logits())
    wide = student.double(), teacher.double()
    expected = torch.from_numpy(case.naive(*(z.numpy() for z in wide)))
    torch.testing.assert_close(case.loss(student, teacher).double(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(
        slope(case.loss, student, teacher).double(),
        slope(case.loss, *wide),
        rtol=2e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("loss", SMOOTH.values(), ids=SMOOTH.keys())
def test_gradcheck(loss: Loss) -> None:
    student, teacher = logits(rows=4, vocabulary=5)
    assert torch.autograd.gradcheck(loss, (student, teacher.requires_grad_()))


def test_the_gradient_of_forward_kl_is_q_minus_p() -> None:
    student, teacher = logits()
    expected = student.softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(slope(forward_kl, student, teacher), expected.detach())


@every_loss
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 3e-14), (torch.float32, 1e-6)])
def test_equal_models_read_zero_with_a_zero_gradient(
    loss: Loss, dtype: torch.dtype, most: float
) -> None:
    same = logits(vocabulary=1000)[1].to(dtype)
    assert loss(same, same).abs().max() <= most
    assert slope(loss, same, same).abs().max() <= most


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_equal_models_read_exactly_zero(loss: Loss) -> None:
    same = logits(vocabulary=1000)[1].float()
    assert loss(same, same).tolist() == [0.0] * len(same)


@every_loss
@pytest.mark.parametrize("apart", [1e-9, 1e-3, 1.0, 100.0])
def test_never_negative_beyond_rounding(loss: Loss, apart: float) -> None:
    student, teacher = logits(rows=200)
    near = teacher + apart * student.detach()
    assert loss(near, teacher).min() >= -1e-14
    assert loss(near.float(), teacher.float()).min() >= -1e-6


@every_loss
def test_a_shift_of_all_logits_changes_nothing(loss: Loss) -> None:
    student, teacher = logits()
    moved = student + torch.tensor([[-30.0], [0.0], [2.0], [7.0], [50.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(moved, teacher - 11), loss(student, teacher))
    torch.testing.assert_close(slope(loss, moved, teacher - 11), slope(loss, student, teacher))


@every_loss
def test_the_order_of_tokens_and_rows_does_not_matter(loss: Loss) -> None:
    student, teacher = logits()
    tokens, rows = torch.randperm(9), torch.randperm(5)
    torch.testing.assert_close(
        loss(student[rows][:, tokens], teacher[rows][:, tokens]), loss(student, teacher)[rows]
    )


def test_forward_and_reverse_are_each_other_swapped() -> None:
    student, teacher = logits()
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_swaps_with_its_beta(beta: float) -> None:
    student, teacher = logits()
    torch.testing.assert_close(
        jsd(student, teacher, beta=beta), jsd(teacher, student, beta=1 - beta)
    )


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_at_most_the_entropy_of_its_beta(beta: float) -> None:
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    disjoint = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert jsd(*disjoint, beta=beta).item() == pytest.approx(most, rel=1e-6)
    student, teacher = logits(rows=200, size=20)
    assert jsd(student, teacher, beta=beta).max() <= most + 1e-12


def test_closed_forms() -> None:
    even, tilted = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, math.log(3.0)]])
    tilted = tilted.double()
    assert forward_kl(tilted, even).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-8)
    assert forward_kl(tilted, even).item() == pytest.approx(0.143841, abs=1e-6)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert reverse_kl(tilted, even).item() == pytest.approx(reverse, abs=1e-8)
    middle = 0.5 * (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)) + 0.5 * (
        0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    )
    assert jsd(tilted, even).item() == pytest.approx(middle, abs=1e-8)


def test_jsd_over_beta_tends_to_forward_kl() -> None:
    student, teacher = logits(size=1.0)
    errors = [
        (jsd(student, teacher, beta=b) / b - forward_kl(student, teacher)).abs().max().item()
        for b in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > 50 * errors[1] > 50 * errors[2]
    assert errors[2] < 1e-4
    torch.testing.assert_close(
        slope(partial(jsd, beta=1e-6), student, teacher) / 1e-6,
        slope(forward_kl, student, teacher),
        atol=1e-4,
        rtol=1e-3,
    )


def test_jsd_over_one_minus_beta_tends_to_reverse_kl() -> None:
    student, teacher = logits(size=1.0)
    torch.testing.assert_close(
        jsd(student, teacher, beta=1 - 1e-6) / 1e-6,
        reverse_kl(student, teacher),
        atol=1e-4,
        rtol=1e-3,
    )


@pytest.mark.parametrize("beta", [-0.1, 0.0, 1.0, 1.5, math.nan])
def test_jsd_refuses_a_beta_outside(beta: float) -> None:
    with pytest.raises(ValueError, match=r"jsd: beta=.* is outside \(0, 1\).*forward_kl"):
        jsd(*logits(), beta=beta)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_normalized_jsd_refuses_what_is_no_fraction(beta: float) -> None:
    with pytest.raises(ValueError, match=r"jsd: beta=.* is outside .*takes 0 and 1 as well"):
        jsd(*logits(), beta=beta, normalize_ends=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("near", "end", "limit"),
    [
        (1e-4, 0.0, forward_kl),
        (1e-7, 0.0, forward_kl),
        (1e-12, 0.0, forward_kl),
        (1 - 1e-4, 1.0, reverse_kl),
        (1 - 1e-7, 1.0, reverse_kl),
    ],
)
def test_normalized_jsd_goes_continuously_to_its_ends(
    dtype: torch.dtype, near: float, end: float, limit: Loss
) -> None:
    student, teacher = (z.detach().to(dtype) for z in logits(size=1.0))
    close = partial(jsd, beta=near, normalize_ends=True)
    at_end = partial(jsd, beta=end, normalize_ends=True)
    most = 100 * abs(near - end) + (3e-6 if dtype == torch.float32 else 1e-12)
    assert torch.equal(at_end(student, teacher), limit(student, teacher))
    for function in (lambda f: f(student, teacher), lambda f: slope(f, student, teacher)):
        torch.testing.assert_close(function(close), function(limit), rtol=0, atol=most)


def test_normalized_jsd_has_one_scale() -> None:
    student, teacher = logits(size=0.01)  # all f-divergences are chi squared over 2 there
    expected = forward_kl(student, teacher)
    for beta in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0):
        values = jsd(student, teacher, beta=beta, normalize_ends=True)
        torch.testing.assert_close(values, expected, rtol=2e-2, atol=0)


def test_skews_mirror_each_other() -> None:
    student, teacher = logits()
    for alpha in ALPHAS:
        torch.testing.assert_close(
            skew_reverse_kl(student, teacher, alpha=alpha),
            skew_forward_kl(teacher, student, alpha=alpha),
        )


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_made_of_the_skews(beta: float) -> None:
    student, teacher = logits()
    forward = skew_forward_kl(student, teacher, alpha=beta)
    reverse = skew_reverse_kl(student, teacher, alpha=1 - beta)
    torch.testing.assert_close(
        jsd(student, teacher, beta=beta), beta * forward + (1 - beta) * reverse
    )


@pytest.mark.parametrize(
    ("skew", "limit"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)]
)
def test_skews_tend_to_the_kls(skew: Callable[..., Tensor], limit: Loss) -> None:
    student, teacher = logits(size=1.0)
    near = partial(skew, alpha=1e-6)
    torch.testing.assert_close(near(student, teacher), limit(student, teacher), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        slope(near, student, teacher), slope(limit, student, teacher), rtol=0, atol=1e-3
    )
    assert partial(skew, alpha=1 - 1e-12)(student, teacher).abs().max() < 1e-10


@pytest.mark.parametrize("skew", [skew_forward_kl, skew_reverse_kl])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skews_are_at_most_minus_the_log_of_alpha(
    skew: Callable[..., Tensor], alpha: float, dtype: torch.dtype
) -> None:
    disjoint = torch.tensor([[1e4, -math.inf]]).to(dtype), torch.tensor([[-1e4, 1e4]]).to(dtype)
    assert skew(*disjoint, alpha=alpha).item() == pytest.approx(-math.log(alpha), rel=1e-6)
    student, teacher = logits(rows=200, size=30)
    values = skew(student, teacher, alpha=alpha)
    assert values.max() <= -math.log(alpha) + 1e-12


def test_the_mixture_of_skew_reverse_kl_is_differentiated() -> None:
    student, teacher = logits()
    q, p = student.softmax(-1), teacher.softmax(-1)
    held = (q * (q / (0.9 * p + 0.1 * q.detach())).log()).sum()
    apart = torch.autograd.grad(held, student)[0] - slope(skew_reverse_kl, student, teacher)
    assert apart.abs().max() > 1e-2


@pytest.mark.parametrize("skew", [skew_forward_kl, skew_reverse_kl])
@pytest.mark.parametrize("alpha", [-0.1, 0.0, 1.0, 1.5, math.nan])
def test_skews_refuse_an_alpha_outside(skew: Callable[..., Tensor], alpha: float) -> None:
    limit = "forward_kl" if skew is skew_forward_kl else "reverse_kl"
    with pytest.raises(
        ValueError, match=rf"{skew.__name__}: alpha=.* is outside \(0, 1\); .* write {limit};"
    ):
        skew(*logits(), alpha=alpha)


def test_tvd_is_a_distance_between_0_and_1() -> None:
    disjoint = torch.tensor([[1e4, -math.inf]]), torch.tensor([[-1e4, 1e4]])
    assert tvd(*disjoint).item() == 1.0
    a, b, c = *logits(rows=200), logits(rows=200, seed=1)[1]
    torch.testing.assert_close(tvd(a, b), tvd(b, a))
    assert (tvd(a, c) <= tvd(a, b) + tvd(b, c) + 1e-12).all()
    assert (tvd(a, b) <= (forward_kl(a, b) / 2).sqrt() + 1e-12).all()  # Pinsker


def logits_term(vocabulary: int, **settings: float | str) -> HeadTerm:
    spec = ModelSpec("tiny", "llama", 1, 8, 1, vocabulary)
    term = Logits(**settings).build(spec, spec)  # type: ignore[arg-type]  # fields by their names
    assert isinstance(term, HeadTerm)
    return term


def test_a_high_temperature_is_half_the_squared_distance_of_centred_logits() -> None:
    student, teacher = logits()
    term = logits_term(9, temperature=1000.0)
    difference = student - student.mean(-1, keepdim=True) - teacher
    expected = (difference + teacher.mean(-1, keepdim=True)).square().sum(-1) / (2 * 9)
    torch.testing.assert_close(
        term.values(student, teacher, torch.zeros(5)), expected, rtol=2e-2, atol=0.0
    )
    hotter = logits_term(9, temperature=1e5).values(student, teacher, torch.zeros(5))
    torch.testing.assert_close(hotter, expected, rtol=2e-4, atol=0.0)


def test_t_squared_keeps_the_size_of_the_gradient() -> None:
    student, teacher = logits(rows=50, size=1.0)

    def size(**settings: float | str) -> float:
        term = logits_term(9, **settings)
        gradient = slope(lambda s, t: term.values(s, t, torch.zeros(50)), student, teacher)
        return float(gradient.norm(dim=-1).mean())

    assert size(temperature=20.0) == pytest.approx(size(temperature=4.0), rel=0.15)
    ratio = size(temperature=20.0, scaling="none") / size(temperature=20.0)
    assert ratio == pytest.approx(1 / 400, rel=1e-9)
    assert size(temperature=20.0, scaling="T") == pytest.approx(size(temperature=20.0) / 20)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype)
    assert loss(student, teacher).isfinite().all()
    assert slope(loss, student, teacher).isfinite().all()
    assert loss(student, teacher)[1] == pytest.approx(0.0, abs=1e-6)


def test_extreme_logits_have_their_true_value() -> None:
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert forward_kl(student, teacher).item() == 2e4
    assert reverse_kl(student, teacher).item() == 2e4
    assert slope(forward_kl, student, teacher).tolist() == [[1.0, -1.0]]


@every_loss
def test_tokens_both_forbid_do_not_exist(loss: Loss) -> None:
    student, teacher = logits()
    barred = [torch.cat([z.detach(), torch.full((5, 2), -math.inf)], 1) for z in (student, teacher)]
    torch.testing.assert_close(loss(*barred), loss(student, teacher).detach())
    gradient = slope(loss, *barred)
    torch.testing.assert_close(gradient[:, :9], slope(loss, student, teacher))
    assert gradient[:, 9:].tolist() == [[0.0, 0.0]] * 5


@every_case
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_tokens_one_forbids(case: Case, who: str) -> None:
    loss = case.loss
    student, teacher = (z.detach().clone() for z in logits())
    (student if who == "student" else teacher)[:, 3] = -math.inf
    expected = torch.from_numpy(case.naive(student.numpy(), teacher.numpy()))
    for dtype in (torch.float64, torch.float32):
        values = loss(student.to(dtype), teacher.to(dtype))
        assert values.isfinite().all()
        assert slope(loss, student.to(dtype), teacher.to(dtype)).isfinite().all()
        if expected.isfinite().all():
            torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert values.min() > 1e20


def test_only_the_infinite_divergences_explode() -> None:
    student, teacher = (z.detach().clone() for z in logits())
    student[:, 3] = -math.inf
    assert forward_kl(student, teacher).min() > 1e20
    assert reverse_kl(student, teacher).max() < 100
    assert forward_kl(teacher, student).max() < 100
    assert reverse_kl(teacher, student).min() > 1e20
    mass = teacher.softmax(-1)[:, 3]
    torch.testing.assert_close(forward_kl(student, teacher), -FLOOR * mass)


@every_loss
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_only_that_of_inputs_and_gradients(
    loss: Loss, dtype: torch.dtype, step: float
) -> None:
    student, teacher = (z.detach().to(dtype) for z in logits(rows=50, size=1.0))
    values, gradient = loss(student, teacher), slope(loss, student, teacher)
    assert values.dtype == torch.float32
    assert torch.equal(values, loss(student.float(), teacher.float()))
    torch.testing.assert_close(
        values.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=1e-6
    )
    assert gradient.dtype == dtype
    exact = slope(loss, student.double(), teacher.double())
    torch.testing.assert_close(gradient.double(), exact, rtol=step, atol=1e-6)


# Where it rounds p = q apart, or another token into the head, the gradient jumps.
STEADY = {n: loss for n, loss in LOSSES.items() if not n.startswith(("tvd", "adaptive"))}


@pytest.mark.parametrize("loss", STEADY.values(), ids=STEADY.keys())
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_loses_only_what_the_inputs_lost(
    loss: Loss, dtype: torch.dtype, most: float
) -> None:
    student, teacher = logits(rows=50, size=1.0)
    low = student.detach().to(dtype), teacher.to(dtype)
    torch.testing.assert_close(
        loss(*low).double(), loss(student, teacher).detach(), rtol=most, atol=most
    )
    torch.testing.assert_close(
        slope(loss, *low).double(), slope(loss, student, teacher), rtol=most, atol=most
    )


@every_loss
def test_the_loss_stays_fp32_under_autocast(loss: Loss) -> None:
    student, teacher = (z.detach().float() for z in logits())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), loss(student, teacher))
        inside = loss(student, teacher)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(student, teacher))


@every_loss
def test_no_rows_are_empty_with_a_graph(loss: Loss) -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    values = loss(student, torch.zeros(0, 7))
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@every_loss
def test_one_token_leaves_nothing_to_say(loss: Loss) -> None:
    assert loss(torch.randn(3, 1), torch.randn(3, 1)).abs().max() <= 1e-7


@every_loss
@pytest.mark.parametrize("shape", [(5, 8), (4, 9)])
def test_other_shapes_are_refused(loss: Loss, shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match=r"size of tensor"):
        loss(torch.zeros(5, 9), torch.zeros(shape))
