"""Distances between hidden states against naive float64 loops, and at vectors of length zero."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.features import SHORTEST, cosine, huber, mse
from tests import reference, reference_features

Loss = Callable[[Tensor, Tensor], Tensor]
Naive = Callable[[reference.Array, reference.Array], reference.Array]

PAIRS: dict[str, tuple[Loss, Naive]] = {
    "mse": (mse, reference.mse),
    "cosine": (cosine, reference.cosine),
    "huber": (huber, reference_features.huber),
}
every_pair = pytest.mark.parametrize(("loss", "naive"), PAIRS.values(), ids=PAIRS.keys())
every_loss = pytest.mark.parametrize("loss", [mse, cosine, huber])


def states(rows: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = 2 * torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


def slope(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]


@every_pair
def test_values_and_gradients_match_the_reference(loss: Loss, naive: Naive) -> None:
    student, teacher = states()
    at, fixed = student.detach().numpy(), teacher.numpy()
    torch.testing.assert_close(
        loss(student, teacher).detach(), torch.from_numpy(naive(at, fixed)), rtol=1e-12, atol=1e-13
    )
    expected = torch.from_numpy(reference.gradient(lambda s: naive(s, fixed), at))
    torch.testing.assert_close(slope(loss, student, teacher), expected, rtol=1e-8, atol=1e-10)


@every_loss
def test_gradcheck(loss: Loss) -> None:
    student, teacher = states(rows=3, width=4)
    assert torch.autograd.gradcheck(loss, (student, teacher.requires_grad_()))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_states_read_exactly_zero_with_a_zero_gradient(
    loss: Loss, dtype: torch.dtype
) -> None:
    same = states()[1].to(dtype)
    assert loss(same, same).tolist() == [0.0] * 5
    assert slope(loss, same, same).abs().max() == 0


@every_loss
def test_never_negative(loss: Loss) -> None:
    student, teacher = states(rows=500)
    assert loss(student, teacher).min() > 0
    assert loss(teacher + 1e-12 * student, teacher).min() >= 0


@pytest.mark.parametrize("loss", [mse, cosine])
def test_turning_both_changes_nothing(loss: Loss) -> None:
    student, teacher = states()
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    torch.testing.assert_close(loss(student @ turn, teacher @ turn), loss(student, teacher))


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_huber_is_half_the_square_below_delta_and_a_line_beyond(delta: float) -> None:
    errors = torch.tensor([[0.0], [0.3], [-0.499], [10.0], [-10.0]], dtype=torch.float64)
    zero = torch.zeros_like(errors)
    expected = F.huber_loss(errors, zero, reduction="none", delta=delta).squeeze(-1)
    torch.testing.assert_close(huber(errors, zero, delta=delta), expected)
    far = slope(partial(huber, delta=delta), errors, zero)[3:]
    assert far.tolist() == [[delta], [-delta]]


def test_huber_tends_to_half_the_mse() -> None:
    student, teacher = states()
    torch.testing.assert_close(huber(student, teacher, delta=1e6), 0.5 * mse(student, teacher))


@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf, math.nan])
def test_huber_refuses_a_threshold_without_a_square(delta: float) -> None:
    with pytest.raises(ValueError, match=rf"huber: delta={delta} is not inside \(0, inf\)"):
        huber(*states(), delta=delta)


def test_mse_of_known_vectors() -> None:
    assert mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).tolist() == [2.0]


def test_mse_does_not_change_when_features_are_repeated() -> None:
    student, teacher = states()
    torch.testing.assert_close(
        mse(student.repeat(1, 3), teacher.repeat(1, 3)), mse(student, teacher)
    )


def test_cosine_is_one_minus_the_cosine() -> None:
    student, teacher = states()
    torch.testing.assert_close(
        cosine(student, teacher), 1 - F.cosine_similarity(student, teacher, dim=-1)
    )
    axis = torch.tensor([[1.0, 0.0]])
    turned = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0]])
    assert cosine(turned, axis.expand(3, 2)).tolist() == [0.0, 1.0, 2.0]


def test_cosine_ignores_lengths() -> None:
    student, teacher = states()
    lengths = torch.tensor([[1e-3], [0.1], [1.0], [10.0], [1e5]], dtype=torch.float64)
    torch.testing.assert_close(cosine(lengths * student, teacher / 7), cosine(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_of_a_vector_without_direction(dtype: torch.dtype) -> None:
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1e-9, 0.0]], dtype=dtype)
    teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(
        cosine(student, teacher), torch.tensor([0.5, 0.0, 0.5, 0.5], dtype=dtype)
    )
    assert slope(cosine, student, teacher).tolist() == [[0.0, 0.0]] * 4


def test_the_gradient_of_cosine_is_bounded_near_zero() -> None:
    lengths = torch.logspace(-12, 0, 200, dtype=torch.float64)[:, None]
    student = lengths * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(200, 2)
    gradient = slope(cosine, student, teacher)
    assert gradient.isfinite().all()
    assert gradient.norm(dim=-1).max() <= 1 / SHORTEST


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_what_the_inputs_lost(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = states(rows=50)
    low = student.detach().to(dtype), teacher.to(dtype)
    values = loss(*low)
    assert values.dtype == torch.float32
    assert torch.equal(values, loss(low[0].float(), low[1].float()))
    torch.testing.assert_close(
        values.double(), loss(student, teacher).detach(), rtol=2e-2, atol=1e-2
    )
    gradient = slope(loss, *low)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(), slope(loss, student, teacher), rtol=2e-2, atol=1e-2
    )


def test_large_fp16_states_do_not_overflow() -> None:
    student = torch.full((1, 4), 1000.0, dtype=torch.float16)
    assert mse(student, torch.zeros_like(student)).tolist() == [1e6]
    assert cosine(60 * student, student).item() == pytest.approx(0, abs=1e-6)


@every_loss
def test_no_rows_are_empty_with_a_graph(loss: Loss) -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    values = loss(student, torch.zeros(0, 7))
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@every_loss
@pytest.mark.parametrize("shape", [(5, 8), (4, 7)])
def test_other_shapes_are_refused(loss: Loss, shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        loss(torch.zeros(5, 7), torch.zeros(shape))
