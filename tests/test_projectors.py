"""Projectors, and their closed-form start against NumPy's least squares."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_distill.projectors import fit_least_squares, identity, linear


def data(rows: int = 60, *, student: int = 6, teacher: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(rows, student, generator=generator, dtype=torch.float64) * 3 + 5
    y = torch.randn(rows, teacher, generator=generator, dtype=torch.float64) - 2
    return x, y


def affine(student: int = 6, teacher: int = 4) -> nn.Linear:
    return nn.Linear(student, teacher, dtype=torch.float64)


def test_identity_changes_nothing() -> None:
    states = torch.randn(3, 8)
    assert identity(8, 8)(states) is states
    assert list(identity(8, 8).parameters()) == []


def test_identity_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"student 8, teacher 16; use projector: linear"):
        identity(8, 16)


def test_linear_goes_from_the_student_to_the_teacher() -> None:
    module = linear(8, 16)
    assert module(torch.randn(3, 8)).shape == (3, 16)
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}


def test_without_a_ridge_it_is_numpys_least_squares() -> None:
    x, y = data()
    projector = affine()
    left = fit_least_squares(projector, x, y, ridge=0.0)
    design = np.concatenate([x.numpy(), np.ones((len(x), 1))], axis=1)
    solution, residuals, *_ = np.linalg.lstsq(design, y.numpy(), rcond=None)
    torch.testing.assert_close(projector.weight.detach(), torch.from_numpy(solution[:-1].T))
    torch.testing.assert_close(projector.bias.detach(), torch.from_numpy(solution[-1]))
    variance = ((y - y.mean(0)) ** 2).sum().item()
    assert left == pytest.approx(residuals.sum() / variance, rel=1e-9)


def test_the_ridge_shrinks_as_in_the_normal_equations() -> None:
    x, y = data()
    projector = affine()
    fit_least_squares(projector, x, y, ridge=0.5)
    centred, target = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    gram = centred.T @ centred
    penalty = 0.5 * np.trace(gram) / len(gram) * np.eye(len(gram))
    expected = np.linalg.solve(gram + penalty, centred.T @ target).T
    torch.testing.assert_close(projector.weight.detach(), torch.from_numpy(expected))
    torch.testing.assert_close(projector(x).mean(0).detach(), y.mean(0))


def test_an_affine_teacher_is_met() -> None:
    x, _ = data()
    y = x @ torch.randn(6, 4, dtype=torch.float64) + 7
    projector = affine()
    assert fit_least_squares(projector, x, y, ridge=1e-12) < 1e-15
    torch.testing.assert_close(projector(x).detach(), y, rtol=1e-6, atol=1e-6)


def test_the_share_left_is_that_of_the_projector() -> None:
    x, y = data()
    projector = affine()
    left = fit_least_squares(projector, x, y)
    residual = (projector(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert left == pytest.approx(residual.item(), rel=1e-9)
    assert 0 < left < 1
    constant = fit_least_squares(affine(), torch.zeros_like(x), y)
    assert constant == pytest.approx(1.0)


def test_nothing_nearby_is_better() -> None:
    x, y = data()
    projector = affine()
    fit_least_squares(projector, x, y, ridge=0.0)
    best = (projector(x) - y).square().sum()
    best.backward()
    assert projector.weight.grad is not None
    assert projector.weight.grad.abs().max() < 1e-8


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_rows_than_features_give_one_answer(rows: int) -> None:
    x, y = data(rows, student=16)
    projector = affine(16)
    left = fit_least_squares(projector, x, y)
    assert left < 1e-4
    assert projector.weight.isfinite().all()
    torch.testing.assert_close(projector(x).detach(), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_projectors_of_other_dtypes(dtype: torch.dtype) -> None:
    x, y = data()
    exact, projector = affine(), linear(6, 4)
    assert isinstance(projector, nn.Linear)
    x.requires_grad_()
    left = fit_least_squares(projector, x.to(dtype), y.to(dtype))
    assert left == pytest.approx(fit_least_squares(exact, x, y), rel=2e-2)
    torch.testing.assert_close(
        projector.weight.detach().double(), exact.weight.detach(), rtol=5e-2, atol=5e-3
    )
    assert projector.weight.dtype == torch.float32
    assert projector.weight.requires_grad
