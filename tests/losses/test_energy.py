"""Energy profiles: closed forms, lengths, and tokens that take everything."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.energy import attention_transfer
from tests.losses.feature_catalogue import slope, states


def one_hot(position: int, rows: int = 8, width: int = 3) -> Tensor:
    spike = torch.zeros(rows, width)
    spike[position] = torch.tensor([1.0, -2.0, 0.5])[:width]
    return spike


def test_two_spikes_apart_are_at_two() -> None:
    values = attention_transfer(one_hot(2), one_hot(5))
    assert values.mean().item() == pytest.approx(2)
    assert values.nonzero().flatten().tolist() == [2, 5]
    assert attention_transfer(one_hot(2), 9 * one_hot(2, width=2)).tolist() == [0.0] * 8


@pytest.mark.parametrize("rows", [2, 10, 500])
def test_the_value_does_not_depend_on_the_length(rows: int) -> None:
    # The mean over positions of the usual code would read 2 / rows.
    values = attention_transfer(one_hot(0, rows), one_hot(1, rows))
    assert values.mean().item() == pytest.approx(2)


def test_rows_of_zeros_leave_the_sum_over_positions_as_it_is() -> None:
    student, teacher = (side.detach() for side in states())
    padded = [torch.cat([side, torch.zeros(7, 5)]) for side in (student, teacher)]
    torch.testing.assert_close(
        attention_transfer(*padded).mean(), attention_transfer(student, teacher).mean()
    )


def test_a_massive_first_token_hides_all_others() -> None:
    student, teacher = (side.detach() for side in states(rows=40))
    before = attention_transfer(student, teacher).mean()
    for side in (student, teacher):
        side[0] *= 1e3
    assert attention_transfer(student, teacher).mean() < 1e-6 * before


def test_layer_normalisation_leaves_no_energies_to_compare() -> None:
    student, teacher = (F.layer_norm(side, (5,)) for side in states())
    assert attention_transfer(student, teacher).max() < 1e-8


@pytest.mark.parametrize("scale", [1e-20, 1e18])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_no_scale_overflows_or_vanishes(scale: float, power: float) -> None:
    student, teacher = (side.detach().float() for side in states())
    torch.testing.assert_close(
        attention_transfer(scale * student, teacher / scale, power=power),
        attention_transfer(student, teacher, power=power),
    )
    gradient = slope(lambda s, t: attention_transfer(s, t, power=power), scale * student, teacher)
    torch.testing.assert_close(
        scale * gradient,
        slope(lambda s, t: attention_transfer(s, t, power=power), student, teacher),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_model_without_energy_is_at_one() -> None:
    student = torch.zeros(8, 3)
    assert attention_transfer(student, one_hot(2)).mean().item() == pytest.approx(1)
    assert slope(attention_transfer, student, one_hot(2)).abs().max() == 0


@pytest.mark.parametrize("power", [0.0, 0.5, -2.0, math.nan])
def test_powers_below_one_are_refused(power: float) -> None:
    with pytest.raises(ValueError, match=r"attention_transfer: power=.* is below 1.*takes 2"):
        attention_transfer(one_hot(0), one_hot(1), power=power)
