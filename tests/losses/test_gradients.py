"""Accumulators of a head pass."""

import pytest
import torch

from llm_distill.losses.gradients import Gradients, accumulate, scaled
from llm_distill.losses.projection import Projection

N, V, D = 6, 5, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_add_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own = Projection(torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.zeros(V))
    slope = torch.randn(N, V).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = Gradients((own.features, own.weight, own.bias), (True, True, True), wide)
    for rows in (slice(0, 4), slice(4, 6)):
        given.add(rows, slope[rows], own)
    (features, _), (weight, kept), (bias, _) = given.finished()
    assert features is not None
    assert weight is not None
    assert bias is not None
    assert (weight.dtype, kept) == (wide, dtype)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    expected = slope.double()
    torch.testing.assert_close(
        features.double(), expected @ own.weight.double(), rtol=bound, atol=bound
    )
    torch.testing.assert_close(
        weight.double(), expected.T @ own.features.double(), rtol=bound, atol=bound
    )
    torch.testing.assert_close(bias.double(), expected.sum(0), rtol=bound, atol=bound)


def test_no_rows_leave_zeros() -> None:
    own = Projection(torch.randn(0, D), torch.randn(V, D))
    found = Gradients((own.features, own.weight, None), (True, True, False), torch.float32)
    (features, _), (weight, _), (bias, _) = found.finished()
    assert features is not None
    assert features.shape == (0, D)
    assert weight is not None
    assert not weight.any()
    assert bias is None


def test_a_total_is_set_or_added_to() -> None:
    a, b = torch.randn(V, N), torch.randn(N, D)
    total = torch.full((V, D), torch.nan)
    accumulate(total, a, b, fresh=True)
    torch.testing.assert_close(total, a @ b)
    accumulate(total, a, b)
    torch.testing.assert_close(total, 2 * (a @ b))
    half = torch.full((V, D), torch.nan)
    accumulate(half, a.bfloat16(), b.bfloat16(), fresh=True)
    accumulate(half, a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, 2 * (a @ b), rtol=5e-2, atol=5e-2)


def test_a_factor_is_multiplied_in_the_wider_dtype() -> None:
    gradient = torch.full((2,), 0.5, dtype=torch.float16)
    found = scaled(gradient, torch.tensor(1e-6), torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2,), 5e-7))
    own = torch.ones(2)
    assert scaled(own, torch.tensor(3.0), torch.float32) is own
