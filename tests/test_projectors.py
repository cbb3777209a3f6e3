"""Projectors, and their closed-form start against NumPy's least squares."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_distill.projectors import (
    Moments,
    fit,
    fit_least_squares,
    fit_procrustes,
    identity,
    linear,
    mlp,
    none,
    orthogonal,
)


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
    left = fit_least_squares(projector, Moments.of(x, y), ridge=0.0)
    design = np.concatenate([x.numpy(), np.ones((len(x), 1))], axis=1)
    solution, residuals, *_ = np.linalg.lstsq(design, y.numpy(), rcond=None)
    torch.testing.assert_close(projector.weight.detach(), torch.from_numpy(solution[:-1].T))
    torch.testing.assert_close(projector.bias.detach(), torch.from_numpy(solution[-1]))
    variance = ((y - y.mean(0)) ** 2).sum().item()
    assert left == pytest.approx(residuals.sum() / variance, rel=1e-9)


def test_the_ridge_shrinks_as_in_the_normal_equations() -> None:
    x, y = data()
    projector = affine()
    fit_least_squares(projector, Moments.of(x, y), ridge=0.5)
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
    assert fit_least_squares(projector, Moments.of(x, y), ridge=1e-12) < 1e-15
    torch.testing.assert_close(projector(x).detach(), y, rtol=1e-6, atol=1e-6)


def test_the_share_left_is_that_of_the_projector() -> None:
    x, y = data()
    projector = affine()
    left = fit_least_squares(projector, Moments.of(x, y))
    residual = (projector(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert left == pytest.approx(residual.item(), rel=1e-9)
    assert 0 < left < 1
    constant = fit_least_squares(affine(), Moments.of(torch.zeros_like(x), y))
    assert constant == pytest.approx(1.0)


def test_nothing_nearby_is_better() -> None:
    x, y = data()
    projector = affine()
    fit_least_squares(projector, Moments.of(x, y), ridge=0.0)
    best = (projector(x) - y).square().sum()
    best.backward()
    assert projector.weight.grad is not None
    assert projector.weight.grad.abs().max() < 1e-8


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_rows_than_features_give_one_answer(rows: int) -> None:
    x, y = data(rows, student=16)
    projector = affine(16)
    left = fit_least_squares(projector, Moments.of(x, y), ridge=1e-4)
    assert left < 1e-4
    assert projector.weight.isfinite().all()
    torch.testing.assert_close(projector(x).detach(), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_projectors_of_other_dtypes(dtype: torch.dtype) -> None:
    x, y = data()
    exact, projector = affine(), linear(6, 4)
    assert isinstance(projector, nn.Linear)
    x.requires_grad_()
    left = fit_least_squares(projector, Moments.of(x.to(dtype), y.to(dtype)))
    assert left == pytest.approx(fit_least_squares(exact, Moments.of(x, y)), rel=2e-2)
    torch.testing.assert_close(
        projector.weight.detach().double(), exact.weight.detach(), rtol=5e-2, atol=5e-3
    )
    assert projector.weight.dtype == torch.float32
    assert projector.weight.requires_grad


WIDTHS = [(6, 4), (4, 6), (5, 5)]


def rigid(student: int, teacher: int) -> nn.Linear:
    """An orthogonal projector in float64."""
    torch.manual_seed(3)
    module = orthogonal(student, teacher).double()
    assert isinstance(module, nn.Linear)
    longer = max(student, teacher)
    basis = torch.linalg.qr(torch.randn(longer, longer, dtype=torch.float64)).Q
    module.weight = basis[:teacher, :student].contiguous()  # exact to float64
    return module


def crooked(weight: Tensor) -> float:
    """How far the shorter side is from orthonormal."""
    tall = weight if len(weight) >= weight.shape[1] else weight.T
    gram = tall.detach().T @ tall.detach()
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())


class TestMlp:
    def test_two_layers_with_a_gelu(self) -> None:
        module, x = mlp(4, 8, hidden=5), torch.randn(3, 4)
        first, second = (m for m in module.modules() if isinstance(m, nn.Linear))
        inner = x @ first.weight.T + first.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        torch.testing.assert_close(module(x), inner @ second.weight.T + second.bias)
        assert first.out_features == 5

    def test_its_hidden_width(self) -> None:
        assert next(mlp(4, 8).parameters()).shape == (8, 4)
        assert next(mlp(8, 4).parameters()).shape == (8, 8)
        with pytest.raises(ValueError, match="mlp has hidden=0; write a width from 1 on"):
            mlp(4, 8, hidden=0)


def test_none_takes_any_widths() -> None:
    states = torch.randn(3, 4)
    assert none(4, 8)(states) is states


@pytest.mark.parametrize(("student", "teacher"), WIDTHS)
class TestOrthogonal:
    def test_it_stays_orthonormal_while_it_is_trained(self, student: int, teacher: int) -> None:
        module = rigid(student, teacher)
        x, y = data(student=student, teacher=teacher)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        first = module.weight.detach().clone()
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (module(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert crooked(module.weight) < 1e-12
        assert not torch.allclose(module.weight, first)

    def test_it_keeps_lengths_where_there_is_room(self, student: int, teacher: int) -> None:
        module, x = rigid(student, teacher), data(student=student)[0]
        moved = (module(x) - module.bias).norm(dim=-1)
        if teacher >= student:
            torch.testing.assert_close(moved, x.norm(dim=-1))
        else:
            assert (moved <= x.norm(dim=-1) + 1e-12).all()

    def test_copies_and_checkpoints(self, student: int, teacher: int) -> None:
        module, x = rigid(student, teacher), data(student=student)[0]
        twin, other = copy.deepcopy(module), orthogonal(student, teacher).double()
        other.load_state_dict(module.state_dict())
        for loaded in (twin, other):
            assert torch.equal(loaded(x), module(x))
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        assert sorted(trained) == ["bias", "parametrizations.weight.original"]

    def test_the_nearest_rigid_map_is_found(self, student: int, teacher: int) -> None:
        """Data that a rigid map made: nothing is left, unless there was a choice of subspace."""
        truth, module = rigid(student, teacher), orthogonal(student, teacher).double()
        x = data(student=student)[0]
        y = (truth(x) + 7).detach()
        left = fit(module, Moments.of(x, y))
        most = 1e-20 if teacher >= student else 1e-6
        assert (module(x) - y).square().sum() / (y - y.mean(0)).square().sum() < most
        assert left < max(most, 1e-14)  # from sums, which lose the digits that cancel
        torch.testing.assert_close(module(x), y, rtol=1e-2, atol=1e-2)

    def test_no_turn_of_it_is_better(self, student: int, teacher: int) -> None:
        """On data without a solution: small rotations in every plane lose."""
        module = rigid(student, teacher)
        x, y = data(student=student, teacher=teacher)
        left = fit(module, Moments.of(x, y))
        weight = module.weight.detach()
        assert crooked(weight) < 1e-12
        x, y = x - x.mean(0), y - y.mean(0)

        def share(turned: Tensor) -> float:
            return float((y - x @ turned.T).square().sum() / y.square().sum())

        assert left == pytest.approx(share(weight), rel=1e-9)
        for side, size in (("left", teacher), ("right", student)):
            for i, j in itertools.combinations(range(size), 2):
                for angle in (-0.05, 0.05):
                    turn = torch.zeros(size, size, dtype=weight.dtype)
                    turn[i, j], turn[j, i] = angle, -angle
                    turn = torch.linalg.matrix_exp(turn)
                    other = turn @ weight if side == "left" else weight @ turn
                    assert share(other) > left - 1e-9

    def test_fitting_draws_none_of_others_random_numbers(self, student: int, teacher: int) -> None:
        module, (x, y) = rigid(student, teacher), data(student=student, teacher=teacher)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        fit_procrustes(module, Moments.of(x, y))
        assert torch.equal(torch.rand(3), expected)


class TestMoments:
    def test_rows_may_come_in_parts(self) -> None:
        """Far from zero as well, with parts of no rows, the first among them."""
        x, y = data()
        x, y = x + 1e4, y - 1e3
        whole, parts = Moments.of(x, y), Moments.of(x[:3], y[:3])
        for part in (slice(3, 3), slice(3, 11), slice(11, None)):
            parts.add(x[part], y[part])
        assert parts.rows == whole.rows == len(x)
        centred = x - x.mean(0), y - y.mean(0)
        naive = centred[0].T @ centred[0], centred[1].T @ centred[0], centred[1].square().sum()
        for found in (whole, parts):
            for one, other in zip(found.centred(), naive, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            for one, other in zip(found.means, (x.mean(0), y.mean(0)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        late = Moments.of(x[:0], y[:0]).add(x, y)
        torch.testing.assert_close(late.centred()[0], naive[0], rtol=1e-4, atol=1e-4)

    def test_they_do_not_grow_with_the_rows(self) -> None:
        x, y = data()
        assert all(len(found) <= max(x.shape[1], y.shape[1]) for found in Moments.of(x, y).means)
        assert Moments.of(x, y).cross.shape == (y.shape[1], x.shape[1])


class TestFit:
    def test_linear_is_the_ridge_optimum(self) -> None:
        x, y = data()
        one, other = affine(), affine()
        assert fit(one, Moments.of(x, y)) == fit_least_squares(other, Moments.of(x, y))
        assert torch.equal(one.weight, other.weight)

    @pytest.mark.parametrize(
        "projector",
        [mlp(6, 4), identity(6, 6), none(6, 4), nn.Linear(6, 4, bias=False)],
        ids=["mlp", "identity", "none", "no bias"],
    )
    def test_others_have_no_closed_form(self, projector: nn.Module) -> None:
        name = type(projector).__name__
        with pytest.raises(ValueError, match=f"{name} has no closed-form optimum; write projector"):
            fit(projector, Moments.of(*data()))
