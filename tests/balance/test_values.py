"""Balances on values, against their papers and closed forms in plain floats."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from llm_distill import CrossEntropy, Logits
from llm_distill.balance import normalised, uncertainty
from llm_distill.balance.base import settle
from llm_distill.binding import bind
from llm_distill.errors import InputError
from llm_distill.signals import ModelSpec

SPEC = ModelSpec("m", "llama", 2, 8, 2, 7)
TERMS = bind([CrossEntropy(), Logits()], SPEC, SPEC, seed=0)
ONES = torch.ones(2)
NOWHERE = torch.zeros(2)


def bound(rule: Any, **settings: Any) -> Any:
    return settle(partial(rule, **settings), TERMS, 2)


class TestNormalised:
    def test_the_first_step_has_its_own_values(self) -> None:
        """Each term counts as its weight, whatever its scale."""
        balance = bound(normalised)
        assert balance.asks(0)
        assert not any(balance.asks(done) for done in range(1, 50))
        values = torch.tensor([1000.0, 2e-3])
        balance.measured(values, NOWHERE)
        assert (values * balance.factors(ONES)).tolist() == pytest.approx([1.0, 1.0])

    def test_later_steps_have_the_mean_of_the_steps_before(self) -> None:
        balance = bound(normalised, momentum=0.5)
        balance.measured(torch.tensor([8.0, 2.0]), NOWHERE)
        balance.after_step(torch.tensor([6.0, 3.0]))
        assert balance.factors(ONES).tolist() == pytest.approx([1 / 6, 1 / 3])
        balance.after_step(torch.tensor([3.0, 3.0]))
        assert balance.factors(ONES).tolist() == pytest.approx([1 / 4, 1 / 3])

    def test_a_solved_term_does_not_explode(self) -> None:
        balance = bound(normalised, floor=1e-3)
        balance.after_step(torch.tensor([0.0, 1e-9]))
        assert balance.factors(ONES).tolist() == pytest.approx([1e3, 1e3])
        balance = bound(normalised, floor=1e-3)
        balance.after_step(torch.tensor([-0.5, 1.0]))  # unbiased estimates may be negative
        assert balance.factors(ONES).tolist() == pytest.approx([1e3, 1.0])

    def test_a_term_whose_items_come_later_waits_for_them(self) -> None:
        balance = bound(normalised)
        assert balance.factors(ONES).tolist() == [0.0, 0.0]
        balance.measured(torch.tensor([2.0, math.nan]), NOWHERE)
        assert balance.factors(ONES).tolist() == [0.5, 0.0]
        balance.after_step(torch.tensor([2.0, math.nan]))
        assert balance.factors(ONES).tolist() == pytest.approx([0.5, 0.0])
        balance.after_step(torch.tensor([math.nan, 4.0]))
        assert balance.factors(ONES).tolist() == pytest.approx([0.5, 0.25])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"momentum": 1.0}, "balance: normalised: momentum=1.0; write 0 <= momentum < 1"),
            ({"momentum": -0.1}, "momentum=-0.1"),
            ({"momentum": math.nan}, "momentum=nan"),
            ({"floor": 0.0}, r"normalised: floor=0.0; write a finite number > 0 \(1e-3\)"),
            ({"floor": math.inf}, "floor=inf"),
        ],
    )
    def test_impossible_numbers(self, settings: dict[str, float], message: str) -> None:
        with pytest.raises(InputError, match=message):
            bound(normalised, **settings)

    def test_in_words(self) -> None:
        told = bound(normalised, momentum=0.9).describe()
        assert told == "normalised: each term over its running mean, momentum 0.9"


class TestUncertainty:
    def test_it_rests_at_the_logarithm_of_the_loss(self) -> None:
        """Where the gradient of e^-s L + s is 0; the weighted value is 1 there."""
        balance = bound(uncertainty, learning_rate=0.1)
        values = torch.tensor([5.0, 0.02])
        for _ in range(400):
            balance.after_step(values)
        assert balance.s.tolist() == pytest.approx([math.log(5.0), math.log(0.02)], abs=1e-5)
        assert (values * balance.factors(ONES)).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)

    def test_a_step_is_the_gradient_of_the_paper(self) -> None:
        balance = bound(uncertainty, learning_rate=0.1)
        s = torch.zeros(2, requires_grad=True)
        values = torch.tensor([1.5, 0.4])
        for _ in range(3):
            objective = (torch.exp(-s) * values + s).sum()
            (slope,) = torch.autograd.grad(objective, s)
            s = (s - 0.1 * slope).detach().requires_grad_()
            balance.after_step(values)
            assert torch.allclose(balance.s, s)

    def test_it_starts_at_the_weights_as_written(self) -> None:
        assert bound(uncertainty).factors(ONES).tolist() == [1.0, 1.0]

    def test_it_is_bounded_where_the_loss_vanishes(self) -> None:
        balance = bound(uncertainty, learning_rate=0.5)
        for _ in range(100):
            balance.after_step(torch.tensor([0.0, 1.0]))
        assert balance.s.tolist() == [-5.0, 0.0]
        assert balance.factors(ONES)[0] == pytest.approx(math.exp(5.0))

    def test_a_huge_value_does_not_throw_it(self) -> None:
        balance = bound(uncertainty, learning_rate=0.01)
        balance.after_step(torch.tensor([1e9, 1.0]))
        assert balance.s.tolist() == pytest.approx([0.01, 0.0])

    def test_a_step_without_items_changes_nothing(self) -> None:
        balance = bound(uncertainty)
        balance.after_step(torch.tensor([3.0, math.nan]))
        assert balance.s[0] > 0
        assert balance.s[1] == 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"learning_rate": 0.0}, "balance: uncertainty: learning_rate=0.0; write a finite"),
            ({"learning_rate": math.inf}, "learning_rate=inf"),
            ({"lowest": 1.0}, r"uncertainty: lowest=1.0; write a finite number <= 0 \(-5\)"),
            ({"lowest": -math.inf}, "lowest=-inf"),
        ],
    )
    def test_impossible_numbers(self, settings: dict[str, float], message: str) -> None:
        with pytest.raises(InputError, match=message):
            bound(uncertainty, **settings)

    def test_in_words(self) -> None:
        assert bound(uncertainty).describe() == "uncertainty: s learned at 0.01, not below -5"


@pytest.mark.parametrize("rule", [normalised, uncertainty])
def test_the_host_reads_nothing(rule: Any) -> None:
    """`meta` tensors have no values that could be read."""
    balance = bound(rule).to("meta")
    values = torch.ones(2, device="meta")
    balance.measured(values, values)
    balance.after_step(values)
    assert balance.factors(values).is_meta
