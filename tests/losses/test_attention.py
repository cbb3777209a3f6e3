"""Distances between attention maps against naive float64 loops, with keys nobody sees."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_distill import heads
from llm_distill.losses.attention import TINY, map_kl, map_mse
from tests import reference

Loss = Callable[[Tensor, Tensor], Tensor]
Naive = Callable[[reference.Array, reference.Array], reference.Array]

PAIRS: dict[str, tuple[Loss, Naive]] = {
    "map_kl": (map_kl, reference.map_kl),
    "map_mse": (map_mse, reference.map_mse),
}
every_pair = pytest.mark.parametrize(("loss", "naive"), PAIRS.values(), ids=PAIRS.keys())
every_loss = pytest.mark.parametrize("loss", [map_kl, map_mse])


def scores(rows: int = 4, count: int = 3, keys: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    both = torch.randn(2, rows, count, keys, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), 2 * both[1]


def maps(**sizes: int) -> tuple[Tensor, Tensor]:
    student, teacher = scores(**sizes)
    return student.detach().softmax(-1), teacher.softmax(-1)


def slope(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Gradient with respect to the maps themselves."""
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]


def slope_of_scores(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    return slope(lambda s, t: loss(s.softmax(-1), t), student, teacher)


@every_pair
def test_values_and_gradients_match_the_reference(loss: Loss, naive: Naive) -> None:
    student, teacher = maps()
    at, fixed = student.numpy(), teacher.numpy()
    torch.testing.assert_close(
        loss(student, teacher), torch.from_numpy(naive(at, fixed)), rtol=1e-12, atol=1e-13
    )
    expected = torch.from_numpy(reference.gradient(lambda s: naive(s, fixed), at, step=1e-5))
    torch.testing.assert_close(slope(loss, student, teacher), expected, rtol=1e-7, atol=1e-9)


@every_loss
def test_gradcheck_through_the_softmax(loss: Loss) -> None:
    student, teacher = scores(rows=2, count=2, keys=4)
    through: Loss = lambda s, t: loss(s.softmax(-1), t.softmax(-1))  # noqa: E731
    assert torch.autograd.gradcheck(through, (student, teacher.requires_grad_()))


@every_loss
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_equal_maps_read_zero_with_a_zero_gradient(
    loss: Loss, dtype: torch.dtype, most: float
) -> None:
    same = scores()[1].to(dtype)
    assert loss(same.softmax(-1), same.softmax(-1)).tolist() == [0.0] * 4
    assert slope_of_scores(loss, same, same.softmax(-1)).abs().max() <= most


@every_loss
def test_never_negative_beyond_rounding(loss: Loss) -> None:
    student, teacher = maps(rows=300)
    assert loss(student, teacher).min() > 0
    near = (0.999999 * teacher + 1e-6 * student).float()
    assert loss(near, teacher.float()).min() >= -1e-6


def test_known_maps() -> None:
    even, one = torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    assert map_kl(even, one).item() == pytest.approx(math.log(2))
    assert map_mse(even, one).item() == 0.5
    other = torch.tensor([[[0.0, 1.0, 0.0]]])
    assert map_mse(other, one).item() == 2.0


@every_loss
def test_heads_are_averaged(loss: Loss) -> None:
    student, teacher = maps()
    alone = [loss(student[:, h : h + 1], teacher[:, h : h + 1]) for h in range(3)]
    torch.testing.assert_close(loss(student, teacher), torch.stack(alone).mean(0))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss(student[:, order], teacher[:, order]), loss(student, teacher))


@every_loss
def test_the_order_of_heads_does_not_matter_after_their_mean(loss: Loss) -> None:
    student, teacher = maps()
    mixed = loss(*heads.mean(student[:, [2, 0, 1]], teacher))
    torch.testing.assert_close(mixed, loss(*heads.mean(student, teacher)))


@every_loss
def test_keys_nobody_sees_change_nothing(loss: Loss) -> None:
    student, teacher = scores()
    nobody = torch.full((4, 3, 7), -math.inf, dtype=torch.float64)
    longer = [torch.cat([z.detach(), nobody], -1) for z in (student, teacher)]
    torch.testing.assert_close(
        loss(longer[0].softmax(-1), longer[1].softmax(-1)),
        loss(student.softmax(-1), teacher.softmax(-1)).detach(),
    )
    gradient = slope_of_scores(loss, longer[0], longer[1].softmax(-1))
    assert gradient[..., 6:].abs().max() == 0
    torch.testing.assert_close(
        gradient[..., :6], slope_of_scores(loss, student, teacher.softmax(-1))
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_of_one_model_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    student = torch.tensor([[[0.0, 1.0, 0.0]], [[0.2, 0.3, 0.5]]], dtype=dtype)
    teacher = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0]]], dtype=dtype)
    assert loss(student, teacher).isfinite().all()
    assert slope(loss, student, teacher).isfinite().all()


def test_a_key_only_the_teacher_sees_counts_with_the_floor() -> None:
    student, teacher = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5, 0.5]]])
    expected = -math.log(2) - 0.5 * math.log(TINY)
    assert map_kl(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_scores_is_bounded_where_the_student_underflows() -> None:
    sharp = torch.tensor([[[0.0, depth, -200.0]] for depth in (-60.0, -69.0, -75.0, -110.0)])
    teacher = torch.full((4, 1, 3), 1 / 3)
    gradient = slope_of_scores(map_kl, sharp, teacher)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_what_the_inputs_lost(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = maps(rows=50)
    low = student.to(dtype), teacher.to(dtype)
    values = loss(*low)
    assert values.dtype == torch.float32
    assert torch.equal(values, loss(low[0].float(), low[1].float()))
    torch.testing.assert_close(values.double(), loss(student, teacher), rtol=2e-2, atol=1e-2)
    assert slope(loss, *low).dtype == dtype


def test_zeros_in_fp16_stay_finite() -> None:
    student = torch.tensor([[[0.0, 1.0]]], dtype=torch.float16)
    assert map_kl(student, student).tolist() == [0.0]


@every_loss
def test_no_rows_are_empty_with_a_graph(loss: Loss) -> None:
    student = torch.zeros(0, 3, 7, requires_grad=True)
    values = loss(student, torch.zeros(0, 3, 7))
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 3, 7)


@every_loss
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 2, 6), (3, 3, 6)])
def test_other_shapes_are_refused(loss: Loss, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        loss(torch.full((4, 3, 6), 1 / 6), torch.full(shape, 0.1))
