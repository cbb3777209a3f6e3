"""The balance on gradients: which layer, which factors."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits, layers
from llm_distill.balance import gradient
from llm_distill.balance.base import settle
from llm_distill.balance.gradients import lowest_state
from llm_distill.binding import bind
from llm_distill.errors import InputError
from llm_distill.signals import ModelSpec, Request

SPEC = ModelSpec("m", "llama", 4, 8, 2, 7)
VALUES = torch.zeros(2)
HINT = HiddenStates(layers=partial(layers.explicit, pairs=[[2, 2], [3, 4]]))


def bound(*objectives: Any, **settings: Any) -> Any:
    terms = bind(objectives or (CrossEntropy(), Logits()), SPEC, SPEC, seed=0)
    return settle(partial(gradient, **settings), terms, SPEC.depth)


def norms(balance: Any, *values: float) -> None:
    balance.measured(VALUES, torch.tensor(values).square())


class TestLayer:
    def test_by_default_it_is_the_lowest_that_a_term_reads(self) -> None:
        assert bound().layer == 4
        assert bound(Logits(), HINT).layer == 2
        maps = AttentionMaps(layers=partial(layers.explicit, pairs=[[2, 4]]))
        assert bound(HINT, maps).layer == 1  # the block works on the state below it

    def test_of_a_request(self) -> None:
        assert lowest_state(Request(logits=True), 6) == 6
        assert lowest_state(Request(hidden=frozenset({0, 5})), 6) == 0
        assert lowest_state(Request(heads=frozenset({3, 5})), 6) == 2

    def test_lower_layers_see_everything(self) -> None:
        assert bound(Logits(), HINT, layer=0).layer == 0

    def test_a_term_below_the_layer_is_refused(self) -> None:
        message = (
            "balance: gradient: HiddenStates reads the student from hidden state 2 on, and its "
            "gradient would not be seen at layer=3; write layer: 2 or leave it out"
        )
        with pytest.raises(InputError, match=message):
            bound(Logits(), HINT, layer=3)

    @pytest.mark.parametrize("layer", [-1, 5])
    def test_a_layer_that_is_not_there(self, layer: int) -> None:
        with pytest.raises(InputError, match=rf"gradient: layer={layer}; .* hidden states 0\.\.4"):
            bound(layer=layer)


class TestFactors:
    def test_weighted_norms_are_as_the_weights_and_their_sum_stays(self) -> None:
        balance = bound()
        norms(balance, 3.0, 0.5)
        weights = torch.tensor([0.2, 1.0])
        weighted = weights * balance.factors(weights) * torch.tensor([3.0, 0.5])
        assert float(weighted[1] / weighted[0]) == pytest.approx(1.0 / 0.2)
        assert float(weighted.sum()) == pytest.approx(0.2 * 3.0 + 1.0 * 0.5)

    def test_one_term_alone_keeps_its_weight(self) -> None:
        """So does one whose companions faded out."""
        balance = bound(Logits())
        balance.measured(torch.zeros(1), torch.tensor([49.0]))
        assert balance.factors(torch.tensor([2.0])).tolist() == pytest.approx([1.0])
        balance = bound()
        norms(balance, 3.0, 0.5)
        assert float(balance.factors(torch.tensor([1.0, 0.0]))[0]) == pytest.approx(1.0)

    def test_norms_are_running_means_over_measurements(self) -> None:
        balance = bound(momentum=0.5)
        norms(balance, 1.0, 1.0)
        norms(balance, 4.0, 1.0)
        assert balance.norms.mean.tolist() == pytest.approx([3.0, 1.0])

    @pytest.mark.parametrize("nothing", [math.nan, math.inf])
    def test_a_term_without_items_keeps_what_was_known(self, nothing: float) -> None:
        balance = bound()
        norms(balance, 2.0, nothing)
        assert balance.factors(torch.ones(2)).tolist() == pytest.approx([1.0, 0.0])
        norms(balance, nothing, 4.0)
        assert balance.norms.mean.tolist() == pytest.approx([2.0, 4.0])
        assert balance.factors(torch.ones(2)).tolist() == pytest.approx([1.5, 0.75])

    def test_factors_are_bounded(self) -> None:
        balance = bound(most=100.0)
        norms(balance, 1.0, 0.0)
        assert balance.factors(torch.ones(2)).tolist() == pytest.approx([0.5, 100.0])

    def test_no_gradient_anywhere(self) -> None:
        balance = bound()
        norms(balance, 0.0, 0.0)
        assert balance.factors(torch.ones(2)).tolist() == [1.0, 1.0]
        assert balance.factors(torch.zeros(2)).tolist() == [0.0, 0.0]

    def test_nothing_counts_before_the_first_measurement(self) -> None:
        assert bound().factors(torch.ones(2)).tolist() == [0.0, 0.0]

    def test_the_host_reads_nothing(self) -> None:
        balance = bound().to("meta")
        given = torch.ones(2, device="meta")
        balance.measured(given, given)
        assert balance.factors(given).is_meta


def test_it_measures_before_every_so_many_steps() -> None:
    balance = bound(every=3)
    assert [done for done in range(8) if balance.asks(done)] == [0, 3, 6]
    assert not balance.hears


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, r"balance: gradient: every=0; write a number of steps >= 1 \(20\)"),
        ({"momentum": 1.0}, "gradient: momentum=1.0; write 0 <= momentum < 1"),
        ({"most": 0.5}, "gradient: most=0.5; write a finite number >= 1"),
        ({"most": math.nan}, "gradient: most=nan"),
    ],
)
def test_impossible_numbers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bound(**settings)


def test_in_words() -> None:
    told = bound(layer=2, every=5).describe()
    expected = "gradient: norms at hidden state 2 of the student as the weights, measured every 5"
    assert told == f"{expected} steps"
