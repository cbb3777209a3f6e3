"""Logits from hidden states and a head, and the gradient back through what follows the product."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.softmax import FLOOR

FINISHES = [Finish(), Finish(scale=0.25), Finish(softcap=3.0), Finish(scale=2.0, softcap=3.0)]
every_finish = pytest.mark.parametrize("finish", FINISHES, ids=str)


def product(dtype: torch.dtype = torch.float64) -> Tensor:
    z = 4 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z.to(dtype)


class TestFinish:
    def test_formula(self) -> None:
        found = Finish(scale=0.5, softcap=30.0)(torch.tensor([[100.0]]))
        assert found.item() == pytest.approx(30 * math.tanh(50 / 30), rel=1e-6)
        assert torch.equal(Finish()(product()), product())

    @every_finish
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_written_elsewhere_or_in_place_it_is_the_same(
        self, finish: Finish, dtype: torch.dtype
    ) -> None:
        z = product(dtype)
        expected = finish(z)
        assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(z, product(dtype))
        out = torch.full_like(expected, math.nan)
        assert finish.into(z, out, clamp=False) is out
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(z, product(dtype))
        same = expected.dtype == dtype
        if same:
            assert finish.into(z, z, clamp=True) is z
            torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)

    @every_finish
    def test_a_forbidden_token_is_made_finite(self, finish: Finish) -> None:
        """By a soft cap at its bound, as the model itself does."""
        z = torch.tensor([[0.5, -math.inf]])
        found = finish.into(z, torch.empty(1, 2), clamp=True)
        assert found[0, 1] == (FLOOR if finish.softcap is None else -3.0)
        assert found[0, 0] == finish(z)[0, 0]

    def test_nan_is_not_made_finite(self) -> None:
        found = Finish().into(torch.tensor([[math.nan, 0.0]]), torch.empty(1, 2), clamp=True)
        assert found.isnan().tolist() == [[True, False]]

    @every_finish
    def test_the_gradient_of_the_product_is_that_of_autograd(self, finish: Finish) -> None:
        z = product().requires_grad_()
        finished = finish(z)
        upstream = torch.randn_like(finished)
        (expected,) = torch.autograd.grad(finished, z, upstream)
        slope = upstream.clone()
        assert finish.chain_(slope, finished.detach().clone()) is slope
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)

    def test_without_a_cap_the_logits_are_not_looked_at(self) -> None:
        """They may be gone by then: the gradient grows in their place."""
        slope = torch.ones(1, 2)
        assert Finish(scale=0.5).chain_(slope, slope).tolist() == [[0.5, 0.5]]


class TestProjection:
    @pytest.fixture
    def model(self) -> Projection:
        return Projection(torch.randn(6, 3), torch.randn(8, 3), torch.randn(8), FINISHES[3])

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_product_of_some_rows(self, model: Projection, bias: bool) -> None:
        model = model if bias else replace(model, bias=None)
        out = torch.full((2, 8), math.nan)
        assert model.product(slice(3, 5), out) is out
        expected = F.linear(model.features, model.weight, model.bias)[3:5]
        torch.testing.assert_close(out, expected)

    def test_rows_and_vocabulary(self, model: Projection) -> None:
        assert (len(model), model.vocabulary) == (6, 8)

    def test_in_another_dtype_it_is_detached(self, model: Projection) -> None:
        model.features.requires_grad_()
        model.weight.requires_grad_()
        moved = model.to(torch.bfloat16)
        assert moved.finish is model.finish
        assert moved.bias is not None
        for tensor in (moved.features, moved.weight, moved.bias):
            assert tensor.dtype == torch.bfloat16
            assert not tensor.requires_grad
        assert replace(model, bias=None).to(torch.float64).bias is None

    def test_in_its_own_dtype_nothing_is_copied(self, model: Projection) -> None:
        assert model.to(torch.float32).weight.data_ptr() == model.weight.data_ptr()

    def test_where_a_product_can_be_infinite(self, model: Projection) -> None:
        """A bias of -inf stands for padding, and fp16 overflows at 65504."""
        assert not model.finite
        plain = replace(model, bias=None)
        assert plain.finite
        assert plain.to(torch.bfloat16).finite
        assert not plain.to(torch.float16).finite
