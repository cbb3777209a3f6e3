"""Closed forms against autograd of the functions they stand for."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses import (
    adaptive_kl,
    alpha_beta,
    decoupled,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    todi,
    tvd,
)
from llm_distill.losses import closed as forms
from llm_distill.losses.closed import CLOSED, LEAST, Form, Slope, closed_form
from llm_distill.losses.pairs import Pair, Scratch
from llm_distill.losses.softmax import FLOOR
from tests.losses.catalogue import CASES, Loss, logits, slope

CPU = torch.device("cpu")
FURTHER: dict[str, Loss] = {
    "jsd(0.01)": partial(jsd, beta=0.01),
    "jsd(0.99)": partial(jsd, beta=0.99),
    "jsd(0.0, normalize_ends)": partial(jsd, beta=0.0, normalize_ends=True),
    "jsd(1.0, normalize_ends)": partial(jsd, beta=1.0, normalize_ends=True),
    "skew_forward_kl(0.001)": partial(skew_forward_kl, alpha=0.001),
    "skew_forward_kl(0.999)": partial(skew_forward_kl, alpha=0.999),
    "skew_reverse_kl(0.001)": partial(skew_reverse_kl, alpha=0.001),
    "skew_reverse_kl(0.999)": partial(skew_reverse_kl, alpha=0.999),
    "adaptive_kl(0.001)": partial(adaptive_kl, mu=0.001),
    "adaptive_kl(0.999)": partial(adaptive_kl, mu=0.999),
    f"alpha_beta({LEAST}, {LEAST})": partial(alpha_beta, alpha=LEAST, beta=LEAST),
    "alpha_beta(2.0, 0.1)": partial(alpha_beta, alpha=2.0, beta=0.1),
    "alpha_beta(0.1, 3.0)": partial(alpha_beta, alpha=0.1, beta=3.0),
}
LOSSES = {name: case.loss for name, case in CASES.items()} | FURTHER
KNOWN = {name: form for name, loss in LOSSES.items() if (form := closed_form(loss)) is not None}
"""The settings that have a closed form."""

every_form = pytest.mark.parametrize("name", KNOWN)


@dataclass(frozen=True)
class Found:
    """What a form says of two blocks of logits."""

    value: Tensor
    gradient: Tensor
    slope: Slope
    pair: Pair


def pair_of(student: Tensor, teacher: Tensor, *, sole: bool = False) -> Pair:
    scratch = Scratch(student.numel(), student.dtype, CPU)
    return Pair(student.detach().clone(), teacher.clone(), scratch, sole=sole)


def found(form: Form, pair: Pair) -> Found:
    """The gradient is `a - q sum(a)`."""
    said = form(pair)
    total = said.total[:, None] if isinstance(said.total, Tensor) else said.total
    return Found(said.value, said.factor * said.a - pair.q * total, said, pair)


def test_what_has_a_closed_form() -> None:
    """The rest of the catalogue: exponents that are 0, negative or near 0, unless a KL."""
    assert set(LOSSES) - set(KNOWN) == {
        "alpha_beta(0.6, 0.0)",
        "alpha_beta(0.0, 0.4)",
        "alpha_beta(0.5, -0.5)",
        "alpha_beta(-0.3, 0.3)",
        "alpha_beta(0.3, -0.1)",
        "alpha_beta(0.0, 0.0)",
    }
    tested = {getattr(LOSSES[name], "func", LOSSES[name]) for name in KNOWN}
    assert tested == set(CLOSED)


@every_form
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0])
def test_value_and_gradient_are_those_of_autograd(name: str, size: float) -> None:
    student, teacher = logits(30, 40, size=size, seed=1)
    # Other logits of the same distributions: nothing may depend on a row's offset.
    student, teacher = student.detach() + 5.0, teacher - 2.0
    got = found(KNOWN[name], pair_of(student, teacher))
    expected, gradient = LOSSES[name](student, teacher), slope(LOSSES[name], student, teacher)
    assert expected.min() > 0
    torch.testing.assert_close(got.value, expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(got.gradient, gradient, rtol=1e-9, atol=1e-13)


@every_form
def test_the_total_is_the_sum_of_a(name: str) -> None:
    """Therefore gradients sum to 0: no logit is pushed that the softmax does not see."""
    got = found(KNOWN[name], pair_of(*logits(20, 30)))
    total = torch.as_tensor(got.slope.total, dtype=torch.float64).expand(20)
    torch.testing.assert_close(total, (got.slope.factor * got.slope.a).sum(-1))
    assert got.gradient.sum(-1).abs().max() < 1e-13
    assert got.gradient.abs().max() > 1e-4


@every_form
def test_fp32_is_near_float64(name: str) -> None:
    student, teacher = logits(20, 500)
    exact = found(KNOWN[name], pair_of(student, teacher))
    single = found(KNOWN[name], pair_of(student.detach().float(), teacher.float()))
    assert single.value.dtype == single.gradient.dtype == torch.float32
    # A value in which nearly everything cancels, as of the skews near 1, has an absolute error.
    torch.testing.assert_close(single.value.double(), exact.value, rtol=1e-5, atol=1e-6)
    error = (single.gradient.double() - exact.gradient).norm()
    assert error < 2e-5 * exact.gradient.norm() + 3e-7


@every_form
def test_equal_models_have_nothing_to_learn_in_fp32(name: str) -> None:
    same = 4 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(2))
    got = found(KNOWN[name], pair_of(same, same.clone()))
    assert got.value.abs().max() < 1e-5
    assert got.gradient.abs().max() < 1e-6


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    student = [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [0.0, 1.0, FLOOR]]
    teacher = [[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, -1e4, 1e4], [1.0, 0.0, FLOOR]]
    s, t = torch.tensor(student, dtype=dtype), torch.tensor(teacher, dtype=dtype)
    got = found(KNOWN[name], pair_of(s, t))
    assert got.gradient.isfinite().all()
    bound = 1e-9 if dtype == torch.float64 else 1e-3  # 1e4 itself is known to 5e-4 in fp32
    expected = LOSSES[name](s, t), slope(LOSSES[name], s, t)
    torch.testing.assert_close((got.value, got.gradient), expected, rtol=bound / 10, atol=bound)


@pytest.mark.parametrize(
    ("loss", "by_student", "by_teacher"),
    [
        (forward_kl, True, False),
        (reverse_kl, False, True),
        (todi, True, True),
        (adaptive_kl, True, True),
        (jsd, False, False),
        (skew_forward_kl, False, False),
        (skew_reverse_kl, False, False),
        (tvd, False, False),
        (alpha_beta, False, False),
    ],
)
def test_a_token_one_model_forbids(loss: Loss, by_student: bool, by_teacher: bool) -> None:
    """Infinite where the other needs it, and it shows; mixtures are bounded."""
    open_, barred = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[0.0, FLOOR, 0.5]])
    form = closed_form(loss)
    assert form is not None
    for infinite, pair in ((by_student, (barred, open_)), (by_teacher, (open_, barred))):
        got = found(form, pair_of(*pair))
        assert bool(got.value > 1e20) is infinite
        assert got.value.isfinite().all()
        assert infinite or got.gradient.isfinite().all()


def test_forms_of_one_pair_leave_it_as_it_is() -> None:
    """Many terms share a softmax: no form may write where another one reads."""
    student, teacher = logits(7, 11)
    shared = pair_of(student, teacher)
    _ = shared.gap, shared.log_p
    read = [shared.q, shared.p, shared.gap, shared.log_q, shared.log_p]
    before = [tensor.clone() for tensor in read]
    for name in [*KNOWN, *reversed(KNOWN)]:
        got = found(KNOWN[name], shared)
        alone = found(KNOWN[name], pair_of(student, teacher))
        torch.testing.assert_close(got.value, alone.value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got.gradient, alone.gradient, rtol=1e-12, atol=1e-14)
        assert all(torch.equal(a, b) for a, b in zip(read, before, strict=True)), name


@every_form
def test_a_form_alone_on_its_pair_asks_for_no_logits_twice(name: str) -> None:
    """The gap then takes the teacher's place."""
    student, teacher = logits(7, 11)
    sole = found(KNOWN[name], pair_of(student, teacher, sole=True))
    shared = found(KNOWN[name], pair_of(student, teacher))
    assert torch.equal(sole.value, shared.value)
    assert torch.equal(sole.gradient, shared.gradient)


@pytest.mark.parametrize("loss", CLOSED, ids=lambda loss: loss.__name__)
def test_settings_and_defaults_are_those_of_the_function(loss: Callable[..., Tensor]) -> None:
    own = list(inspect.signature(CLOSED[loss], eval_str=True).parameters.values())[1:]
    public = list(inspect.signature(loss, eval_str=True).parameters.values())[2:]
    assert own == public
    assert CLOSED[loss].__name__ == loss.__name__


class Unhashable:
    """A loss that cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(student, teacher)


class TestClosedForm:
    def test_a_function_without_settings_is_its_form(self) -> None:
        assert all(closed_form(loss) is form for loss, form in CLOSED.items())
        assert closed_form(partial(jsd)) is forms.jsd

    def test_settings_are_handed_on(self) -> None:
        form = closed_form(partial(partial(jsd, beta=0.2), normalize_ends=True))
        assert isinstance(form, partial)
        assert form.func is forms.jsd
        assert form.keywords == {"beta": 0.2, "normalize_ends": True}

    @pytest.mark.parametrize(
        "loss",
        [
            lambda s, t: 2.0 * forward_kl(s, t),
            decoupled,
            torch.dist,
            partial(forward_kl, torch.zeros(1, 3)),
            Unhashable(),
        ],
        ids=["a user's", "decoupled", "builtin", "positional", "unhashable"],
    )
    def test_others_have_none(self, loss: Callable[..., Tensor]) -> None:
        assert closed_form(loss) is None

    @pytest.mark.parametrize("one", [1.0, 1])
    def test_limits_of_alpha_beta_are_the_kls(self, one: float) -> None:
        assert closed_form(partial(alpha_beta, alpha=one, beta=0.0)) is forms.forward_kl
        assert closed_form(partial(alpha_beta, alpha=0.0, beta=one)) is forms.reverse_kl

    @pytest.mark.parametrize("less", [0.99 * LEAST, 0.0, -0.3])
    @pytest.mark.parametrize("name", ["alpha", "beta"])
    def test_small_exponents_are_left_to_autograd(self, name: str, less: float) -> None:
        loss: Callable[..., Tensor] = alpha_beta
        assert closed_form(partial(loss, **{name: less})) is None

    @pytest.mark.parametrize("beta", [1e-6, 0.99 * LEAST, 1 - 0.99 * LEAST])
    def test_what_divides_by_little_is_left_to_autograd(self, beta: float) -> None:
        assert closed_form(partial(jsd, beta=beta, normalize_ends=True)) is None
        assert closed_form(partial(jsd, beta=beta)) is not None

    @pytest.mark.parametrize(
        "loss",
        [
            partial(jsd, beta=0.0),
            partial(jsd, beta=1.5),
            partial(jsd, beta=1.5, normalize_ends=True),
            partial(skew_forward_kl, alpha=1.0),
            partial(skew_reverse_kl, alpha=-0.1),
            partial(adaptive_kl, mu=0.0),
            partial(alpha_beta, alpha=math.inf),
            partial(alpha_beta, beta=math.nan),
        ],
        ids=lambda loss: f"{loss.func.__name__} {loss.keywords}",
    )
    def test_impossible_settings_are_refused_as_the_function_does(self, loss: Loss) -> None:
        with pytest.raises(ValueError, match=r"outside \(0, 1\)|must be finite"):
            loss(*logits())
        with pytest.raises(ValueError, match=r"outside \(0, 1\)|must be finite"):
            closed_form(loss)
