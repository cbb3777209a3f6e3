"""Gram matrices: precision beside a common part, and what U-centring takes out."""

import pytest
import torch
from torch import Tensor

from llm_distill.losses.grams import centred, linear_gram, u_centred
from tests import reference_features


def items(rows: int = 6, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def test_centring_and_inner_products_match_the_reference() -> None:
    x = items()
    expected = reference_features.centred(x.numpy())
    torch.testing.assert_close(centred(x), torch.tensor(expected, dtype=torch.float64))
    gram = [[reference_features.dot(a, b) for b in expected] for a in expected]
    torch.testing.assert_close(linear_gram(x), torch.tensor(gram, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e8])
def test_equal_items_leave_nothing_but_zeros(scale: float) -> None:
    same = (torch.full((7, 3), scale / 3) * torch.tensor([1.0, 2.0, 3.0])).requires_grad_()
    assert centred(same).abs().max() == 0
    centred(same).sum().backward()
    assert same.grad is not None
    assert same.grad.abs().max() == 0


def test_an_item_at_the_mean_is_exactly_there() -> None:
    x = torch.tensor([[0.1], [0.3], [0.2]])
    assert centred(x)[2] == 0
    assert centred(x)[0] != 0


def test_a_zero_among_others_keeps_its_direction() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert centred(x)[0].tolist() == pytest.approx([-1 / 3, -1 / 3])


def test_a_common_part_costs_no_digits() -> None:
    x = items(rows=50, width=30).float()
    moved = (x + 100).double() - 100  # what fp32 keeps of it
    torch.testing.assert_close(
        linear_gram(x + 100).double(), linear_gram(moved), rtol=1e-5, atol=5e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_taken_in_fp32(dtype: torch.dtype) -> None:
    x = (100 * items(width=400)).to(dtype)
    assert linear_gram(x).dtype == torch.float32
    assert torch.equal(linear_gram(x), linear_gram(x.float()))


def test_u_centring_matches_the_reference() -> None:
    gram = items() @ items().mT
    expected = torch.from_numpy(reference_features.u_centred(gram.numpy()))
    torch.testing.assert_close(u_centred(gram), expected)
    assert u_centred(gram).diagonal().tolist() == [0.0] * 6
    torch.testing.assert_close(u_centred(gram).sum(-1), torch.zeros(6, dtype=torch.float64))


def test_u_centring_does_not_see_the_diagonal_or_the_mean_of_the_features() -> None:
    gram = items() @ items().mT
    torch.testing.assert_close(u_centred(gram + torch.diag(items()[:, 0])), u_centred(gram))
    moved = items() + torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(u_centred(moved @ moved.mT), u_centred(gram))


def test_the_product_of_two_is_the_unbiased_estimate_of_song() -> None:
    k, m = linear_gram(items()), linear_gram(items(width=9)[:, 4:])
    n = len(k)
    expected = reference_features.hsic(k.numpy(), m.numpy())
    product = (u_centred(k) * u_centred(m)).sum() / (n * (n - 3))
    assert product.item() == pytest.approx(expected, rel=1e-10)


def test_several_are_centred_at_once() -> None:
    grams = torch.stack([items() @ items().mT, 2 * torch.ones(6, 6).double()])
    torch.testing.assert_close(u_centred(grams)[0], u_centred(grams[0]))
    assert u_centred(grams)[1].abs().max() < 1e-15


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"u_centred: a Gram matrix of 2 rows; give 3 or more"):
        u_centred(torch.ones(2, 2))
