"""Energy of hidden states: where in a sequence a layer is active, whatever its width."""

import torch
from torch import Tensor

from llm_distill.losses.groups import is_small, silent
from llm_distill.losses.softmax import wide

__all__ = ["attention_transfer"]


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Distance of the two activation profiles over positions: `[N, D], [N, D'] -> [N]`.

    The rows are the positions of one sequence (a group is a sequence). Formula, for row i:
    `N (a_i - b_i)^2` with `a_i = q_i / |q|` and `q_i = sum_d |h_id|^power`, b the teacher's.
    Their mean is `|a - b|^2`, in [0, 2], whatever the length; code that takes the mean over
    positions instead divides by it, so that longer sequences count less. Widths may differ. A group
    of one row reads 0, and a model whose states are all 0 has the profile 0.

    A token with a massive activation (often the first) takes the whole energy, in every layer of
    both models: take it out of the rows.

    Args:
        student: Hidden states, not normalised: layer normalisation gives all rows one energy.
        teacher: Hidden states, not normalised.
        power: Exponent of the activations; larger ones look at the strongest alone.

    Raises:
        ValueError: If power is below 1, or the two models have different numbers of rows.

    Source: Zagoruyko and Komodakis 2016, arXiv 1612.03928, equation 2, there the norm and here its
    square, which has a gradient at 0.

    >>> attention_transfer(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    tensor([2., 2.])
    """
    if not power >= 1.0:
        raise ValueError(
            f"attention_transfer: power={power} is below 1, where the gradient at 0 is infinite; "
            "the paper takes 2"
        )
    if is_small("attention_transfer", student, teacher, least=2):
        return silent(student)
    return len(student) * (_profile(student, power) - _profile(teacher, power)).square()


def _profile(states: Tensor, power: float) -> Tensor:
    """Energies of the rows as a vector of length 1, or 0: `[N, D] -> [N]`."""
    states = wide(states)
    # The profile does not depend on the scale, so this costs no gradient; powers do not overflow.
    largest = states.detach().abs().amax()
    energy = (states / torch.where(largest > 0, largest, 1.0)).abs().pow(power).sum(-1)
    # The largest activation is 1 now, so that a length is 0 or at least 1.
    length: Tensor = torch.linalg.vector_norm(energy).clamp_min(0.5)
    return energy / length
