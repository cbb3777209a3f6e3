"""Limits of the device functions; the forms themselves are tested in `test_kernels`."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses.divergences import jsd, skew_forward_kl, skew_reverse_kl
from llm_distill.losses.kernels import Form, Spec, score, supports
from llm_distill.losses.reweighted import alpha_beta

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def values(form: Form | None, student: Tensor, teacher: Tensor) -> Tensor:
    assert form is not None
    labels = torch.zeros(len(student), dtype=torch.long, device=DEVICE)
    share = torch.ones((), device=DEVICE)
    spec = Spec(form, share, student.shape[1], grad=False)
    found, _ = score(student.float().to(DEVICE), teacher.float().to(DEVICE), labels, spec)
    return found.cpu().double()


def pair(apart: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 50, generator=generator).double()
    return teacher + apart * torch.randn(4, 50, generator=generator).double(), teacher


def test_every_form_of_the_table_has_a_public_function() -> None:
    from llm_distill.losses import kernels
    from llm_distill.losses.kernel_forms import FORMS

    assert set(FORMS) == {
        *(function.__name__ for function in kernels._FORMS),
        *("beta_alpha", "square"),
    }


@pytest.mark.parametrize("apart", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("beta", [1e-4, 1e-2, 0.99])
def test_a_small_share_keeps_its_digits(beta: float, apart: float) -> None:
    # Divided by beta: an absolute error of fp32's 6e-8 in log(m / q) would read 6e-4.
    loss = partial(jsd, beta=beta, normalize_ends=True)
    # The inputs of both are the fp32 ones.
    student, teacher = (logits.float().double() for logits in pair(apart))
    torch.testing.assert_close(
        values(supports(loss), student, teacher), loss(student, teacher), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("loss", [skew_forward_kl, skew_reverse_kl])
def test_nearly_all_of_the_other_model_keeps_the_digits_of_the_rest(
    loss: Callable[..., Tensor],
) -> None:
    # 1 - share loses what is left of a small share: 6e-8 of 1e-5 would read 6e-3.
    student, teacher = (logits.float().double() for logits in pair(30.0))
    skewed = partial(loss, alpha=1e-5)
    torch.testing.assert_close(
        values(supports(skewed), student, teacher), skewed(student, teacher), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("small", [0.0, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "settings",
    [(1.0, 0.0), (0.0, 1.0), (0.5, -0.5), (-0.5, 0.5)],
    ids=["beta", "alpha", "sum", "sum of the other"],
)
def test_alpha_beta_near_its_limits(settings: tuple[float, float], sign: int, small: float) -> None:
    alpha, beta = settings
    moved = (alpha + sign * small, beta) if alpha == 0.0 else (alpha, beta + sign * small)
    loss = partial(alpha_beta, alpha=moved[0], beta=moved[1])
    student, teacher = (logits.float().double() for logits in pair(1.0))
    torch.testing.assert_close(
        values(supports(loss), student, teacher), loss(student, teacher), rtol=2e-5, atol=1e-5
    )


def test_alpha_beta_where_both_are_nearly_zero() -> None:
    student, teacher = (logits.float().double() for logits in pair(1.0))
    loss = partial(alpha_beta, alpha=1e-5, beta=-1e-5)
    assert supports(loss) == Form("square")
    torch.testing.assert_close(
        values(supports(loss), student, teacher), loss(student, teacher), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_at_most_the_entropy_of_its_beta(beta: float) -> None:
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    disjoint = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    found = values(supports(partial(jsd, beta=beta)), *disjoint)
    assert found.item() == pytest.approx(most, rel=1e-6)
