"""Embeddings of hidden states."""

import pytest
import torch

from llm_distill.objectives.embeddings import Fixed, Trained


@pytest.mark.parametrize("kind", [Trained, Fixed])
def test_embeddings_have_length_one_in_the_states_dtype(kind: type[Trained | Fixed]) -> None:
    module = kind(6, 4).to(torch.bfloat16)
    found = module(torch.randn(5, 6))
    assert (found.shape, found.dtype) == ((5, 4), torch.float32)
    assert torch.allclose(found.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize("width", [3, 8])
def test_a_fixed_map_is_orthonormal_and_no_parameter(width: int) -> None:
    """Rows where it narrows, columns where it widens: then cosines stay."""
    module = Fixed(width, 5)
    weight = module.weight if width > 5 else module.weight.mT
    assert torch.allclose(weight @ weight.mT, torch.eye(len(weight)), atol=1e-6)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == ["weight"]


def test_a_trained_map_is_affine() -> None:
    module, states = Trained(6, 4), torch.randn(5, 6)
    raw = states @ module.weight.mT + module.bias
    assert torch.allclose(module(states), raw / raw.norm(dim=-1, keepdim=True), atol=1e-6)
