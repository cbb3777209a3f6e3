"""The balance that changes nothing, refusals, and running means."""

import math
from collections.abc import Mapping

import pytest
import torch

from llm_distill import CrossEntropy, Logits
from llm_distill.balance import Balance, RunningMean, fixed
from llm_distill.balance.base import settle
from llm_distill.binding import bind
from llm_distill.errors import InputError
from llm_distill.objectives import Term
from llm_distill.signals import ModelSpec

SPEC = ModelSpec("m", "llama", 2, 8, 2, 7)
TERMS = bind([CrossEntropy(), Logits()], SPEC, SPEC, seed=0)


class TestBalance:
    def test_it_changes_nothing_asks_nothing_and_keeps_nothing(self) -> None:
        balance = Balance()
        balance.measured(torch.ones(2), torch.ones(2))
        balance.after_step(torch.ones(2))
        assert balance.factors(torch.tensor([0.3, 2.0])).tolist() == [1.0, 1.0]
        assert not any(balance.asks(step) for step in range(50))
        assert (balance.moves, balance.hears, balance.layer) == (False, False, None)
        assert balance.state_dict() == {}
        assert balance.describe() == ""


class TestSettle:
    @pytest.mark.parametrize("rule", [None, fixed])
    def test_weights_stay_by_default(self, rule: object) -> None:
        assert type(settle(rule, TERMS, 2)) is Balance  # type: ignore[arg-type]  # None, or a rule

    def test_any_function_is_a_balance(self) -> None:
        class Halved(Balance):
            def factors(self, weights: torch.Tensor) -> torch.Tensor:
                return torch.full_like(weights, 0.5)

        def halved(terms: Mapping[str, Term], depth: int) -> Balance:
            assert (list(terms), depth) == (["CrossEntropy", "Logits"], 2)
            return Halved()

        assert settle(halved, TERMS, 2).factors(torch.ones(2)).tolist() == [0.5, 0.5]

    def test_a_refusal_names_the_section(self) -> None:
        def refusing(terms: Mapping[str, Term], depth: int) -> Balance:
            raise ValueError(f"mine: {len(terms)} terms")

        with pytest.raises(InputError, match="balance: mine: 2 terms"):
            settle(refusing, TERMS, 2)


class TestRunningMean:
    def test_it_is_the_bias_corrected_one(self) -> None:
        """The weighted mean with weights momentum^age, from the first number on."""
        values = [4.0, 1.0, 7.0, 2.5]
        running = RunningMean(1, 0.9)
        for count, value in enumerate(values, start=1):
            running.add(torch.tensor([value]))
            shares = [0.9 ** (count - 1 - k) for k in range(count)]
            expected = sum(s * v for s, v in zip(shares, values, strict=False)) / sum(shares)
            assert float(running.mean) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
    def test_what_is_no_finite_number_is_no_news(self, nothing: float) -> None:
        running = RunningMean(2, 0.5)
        running.add(torch.tensor([1.0, 2.0]))
        before = {name: value.clone() for name, value in running.state_dict().items()}
        running.add(torch.tensor([nothing, nothing]))
        assert all(torch.equal(before[name], v) for name, v in running.state_dict().items())
        running.add(torch.tensor([3.0, nothing]))
        assert running.mean.tolist() == pytest.approx([7.0 / 3.0, 2.0])

    def test_nothing_is_known_before_the_first(self) -> None:
        assert RunningMean(2, 0.5).mean.isnan().all()
