"""What a micro-batch gave where it is measured at a layer."""

import pytest
import torch

from llm_distill.errors import InputError
from llm_distill.outcomes import Slopes


def test_squared_norms() -> None:
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    found = Slopes((2 * hidden.sum(), hidden.square().sum()), hidden).squares(["a", "b"])
    assert [float(square) for square in found] == [24.0, 24.0]


def test_a_term_without_a_gradient_is_named() -> None:
    hidden, other = (torch.ones(1, 2, 3, requires_grad=True) for _ in range(2))
    with pytest.raises(InputError, match="balance: b has no gradient at the layer"):
        Slopes((hidden.sum(), other.sum()), hidden).squares(["a", "b"])
    with pytest.raises(InputError, match="balance: a has no gradient"):
        Slopes((other.sum(),), hidden.detach()).squares(["a"])
