"""Cross-entropy and divergences on the next-token distribution, against plain formulas."""

import math
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from llm_distill import (
    CrossEntropy,
    Logits,
    Taid,
    adaptive_kl,
    alpha_beta,
    decoupled,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from llm_distill.losses.described import describe_function
from llm_distill.losses.rowwise import Nll
from llm_distill.objectives.logits import row_wise
from llm_distill.signals import ModelSpec, Request


def spec(vocabulary: int) -> ModelSpec:
    return ModelSpec("m", "llama", 2, 8, 2, vocabulary)


def draw(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) with plain softmax."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1)


LABELS = torch.tensor([0, 3, 6, 2])


class TestLogits:
    @pytest.mark.parametrize(("scaling", "power"), [("none", 0), ("T", 1), ("T2", 2)])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_temperature_and_scaling(
        self, scaling: Literal["none", "T", "T2"], power: int, temperature: float
    ) -> None:
        s, t = draw(4, 7, 0), draw(4, 7, 1)
        term = Logits(temperature=temperature, scaling=scaling).build(spec(7), spec(7))
        expected = temperature**power * kl(t / temperature, s / temperature)
        assert torch.allclose(term.values(s, t, LABELS), expected, rtol=1e-12, atol=0)

    def test_t2_keeps_the_size_of_the_gradient(self) -> None:
        s, t = draw(4, 7, 0), draw(4, 7, 1)
        slopes = []
        for temperature in (50.0, 100.0):
            leaf = s.clone().requires_grad_()
            term = Logits(temperature=temperature).build(spec(7), spec(7))
            slopes.append(torch.autograd.grad(term.values(leaf, t, LABELS).sum(), leaf)[0])
        assert torch.allclose(slopes[0], slopes[1], rtol=0.1, atol=0.01)

    @pytest.mark.parametrize(("ours", "theirs"), [(7, 7), (9, 7), (7, 9)])
    @pytest.mark.parametrize("loss", [forward_kl, reverse_kl, partial(jsd, beta=0.3)])
    def test_the_common_tokens_are_renormalised(self, ours: int, theirs: int, loss: Any) -> None:
        s, t = draw(4, ours, 0), draw(4, theirs, 1)
        term = Logits(loss=loss).build(spec(ours), spec(theirs))
        assert torch.equal(term.values(s, t, LABELS), loss(s[:, :7], t[:, :7]))

    def test_equal_models_read_zero(self) -> None:
        s = draw(4, 7, 0)
        values = Logits(temperature=2.0).build(spec(7), spec(7)).values(s, s, LABELS)
        assert values.abs().max() < 1e-15

    def test_both_models_are_asked_for_logits(self) -> None:
        term = Logits().build(spec(7), spec(7))
        assert (term.student, term.teacher) == (Request(logits=True), Request(logits=True))

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_impossible_temperatures_are_refused(self, temperature: float) -> None:
        with pytest.raises(ValueError, match=r"Logits: temperature is .*; it must be a finite num"):
            Logits(temperature=temperature)

    def test_an_unknown_scaling_is_refused(self) -> None:
        wrong: Any = "T3"
        with pytest.raises(ValueError, match="Logits: scaling is 'T3'; write one of none, T, T2"):
            Logits(scaling=wrong)

    @pytest.mark.parametrize(
        ("objective", "words"),
        [
            (Logits(), "forward_kl"),
            (Logits(loss=partial(jsd, beta=0.1)), "jsd(beta=0.1)"),
            (Logits(temperature=2.0), "forward_kl, temperature 2, scaling T2"),
            (Logits(temperature=0.5, scaling="none"), "forward_kl, temperature 0.5, scaling none"),
            (Logits(loss=jsd, target=Taid(start=0.2)), "jsd, target Taid from 0.2 to 1"),
        ],
    )
    def test_it_is_described(self, objective: Logits, words: str) -> None:
        assert objective.describe() == words

    @pytest.mark.parametrize(
        ("loss", "words"),
        [
            (partial(jsd, beta=1.5), r"jsd\(beta=1.5\) fails .*: .*beta"),
            (
                partial(skew_forward_kl, alpha=-0.1),
                r"skew_forward_kl\(alpha=-0.1\) fails .*: .*alpha",
            ),
            (
                partial(skew_reverse_kl, alpha=1.5),
                r"skew_reverse_kl\(alpha=1.5\) fails .*: .*alpha",
            ),
            (partial(adaptive_kl, mu=2.0), r"adaptive_kl\(mu=2.0\) fails .*: .*mu"),
            (partial(alpha_beta, alpha=math.nan), r"alpha_beta\(alpha=nan\) fails .*: .*alpha"),
            (partial(decoupled, alpha=-1.0), r"decoupled\(alpha=-1.0\) fails .*: .*alpha"),
        ],
    )
    def test_a_loss_refuses_its_own_settings(self, loss: Any, words: str) -> None:
        """When the objective is made, with the loss's own message."""
        with pytest.raises(ValueError, match=f"Logits: loss {words}"):
            Logits(loss=loss)

    def test_a_loss_that_asks_for_labels_gets_them(self) -> None:
        s, t = draw(4, 9, 0), draw(4, 7, 1)
        term = Logits(loss=partial(decoupled, beta=2.0)).build(spec(9), spec(7))
        expected = decoupled(s[:, :7], t, labels=LABELS, beta=2.0)
        assert torch.equal(term.values(s, t, LABELS), expected)


class TestCrossEntropy:
    def test_it_is_the_negative_log_probability_over_the_whole_vocabulary(self) -> None:
        s = draw(4, 9, 0)
        term = CrossEntropy().build(spec(9), spec(7))
        expected = -s.softmax(-1).log()[torch.arange(4), LABELS]
        assert torch.allclose(term.values(s, draw(4, 7, 1), LABELS), expected, rtol=1e-12, atol=0)

    def test_the_teacher_is_not_asked(self) -> None:
        assert CrossEntropy().build(spec(7), spec(7)).teacher == Request()

    def test_forbidden_tokens_leave_it_finite(self) -> None:
        logits = torch.tensor([[-math.inf, 0.0, 0.0]], requires_grad=True)
        value = Nll()(logits, None, torch.tensor([1]))
        assert value.item() == pytest.approx(math.log(2.0))
        (slope,) = torch.autograd.grad(value.sum(), logits)
        assert slope.isfinite().all()


class Callable:
    """A loss with a state."""

    def __call__(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).abs().sum(-1)


class TestWords:
    def test_functions_are_named_with_their_settings(self) -> None:
        assert describe_function(jsd) == "jsd"
        assert describe_function(partial(jsd, beta=0.25)) == "jsd(beta=0.25)"
        assert describe_function(Callable()) == "Callable"

    def test_row_wise(self) -> None:
        s, t = draw(4, 7, 0), draw(4, 7, 1)
        assert torch.equal(row_wise(Callable()).values(s, t, LABELS), Callable()(s, t))


@pytest.mark.parametrize("target", [0.4, "Taid"])
def test_a_target_of_another_kind_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=r"Logits: target is .*; write Taid\(\)"):
        Logits(target=target)


class TestExit:
    """A layer of the student below its last."""

    def test_it_asks_for_that_layer(self) -> None:
        for objective in (Logits(exit=1), CrossEntropy(exit=1), Logits(exit=1, target=Taid())):
            term = objective.build(spec(9), spec(9))
            assert term.exit == 1
            assert term.student == Request(exits=frozenset({1}))
            assert term.teacher == Request(logits=isinstance(objective, Logits))
            assert "exit 1" in objective.describe()
        assert Logits().build(spec(9), spec(9)).exit is None
        assert CrossEntropy().describe() == ""

    @pytest.mark.parametrize("layer", [1.5, 1.0, True, "1", [1]])
    @pytest.mark.parametrize("kind", [Logits, CrossEntropy])
    def test_what_is_no_number_of_a_layer(self, kind: Any, layer: Any) -> None:
        with pytest.raises(ValueError, match=f"{kind.__name__}: exit is .*; write the number of"):
            kind(exit=layer)

    @pytest.mark.parametrize("layer", [0, 2, 3, -1])
    def test_a_layer_that_is_none_below_the_last(self, layer: int) -> None:
        with pytest.raises(ValueError, match=f"exit: {layer} of m, which has 2 blocks; write a la"):
            Logits(exit=layer).build(spec(9), spec(9))
