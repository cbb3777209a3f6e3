"""What settings of objectives are held against."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import AttentionMaps, HiddenStates, Logits
from llm_distill.objectives.checks import (
    check_choice,
    check_evidence,
    check_least,
    check_row_function,
)


def scalar(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean()


def over_rows(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().sum(0)


def crashing(s: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("no such thing")


class TestCheckRowFunction:
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (scalar, r"ours: loss scalar returned shape \[\] for 2 rows; .*reduction='none'"),
            (over_rows, r"loss over_rows returned shape \[3\] for 2 rows"),
            (lambda s, t: 1.0, "returned float for 2 rows"),
            (crashing, r"loss crashing fails on two tensors of shape \[2, 3\]: no such thing"),
            (lambda s: s, "fails on two tensors"),
        ],
    )
    def test_what_gives_no_value_per_row_is_refused(self, loss: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_row_function(loss, (2, 3), "ours")

    def test_all_objectives_try_their_loss(self) -> None:
        for objective in (Logits, HiddenStates, AttentionMaps):
            with pytest.raises(ValueError, match=f"{objective.__name__}: loss scalar returned"):
                objective(loss=scalar)

    def test_a_value_per_head_is_no_value_per_row(self) -> None:
        with pytest.raises(ValueError, match=r"AttentionMaps: .* shape \[3\] for 2 rows"):
            AttentionMaps(loss=lambda s, t: (s - t).square().sum(-1).mean(0))


class TestWords:
    def test_choices(self) -> None:
        check_choice("rows", "valid", ("supervised", "valid"))
        with pytest.raises(ValueError, match="rows is 'al'; write one of supervised, valid"):
            check_choice("rows", "al", ("supervised", "valid"))

    def test_evidence_has_rows(self) -> None:
        check_evidence(1, "HiddenStates")
        with pytest.raises(ValueError, match=r"HiddenStates: .*no row to calibrate on; shuffle"):
            check_evidence(0, "HiddenStates")


def test_a_loss_without_a_gradient_trains_nothing() -> None:
    def detached(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s.detach() - t).square().mean(-1)

    with pytest.raises(ValueError, match="detached has no gradient for the student"):
        check_row_function(detached, (2, 3), "ours")


def test_a_loss_that_writes_into_the_logits_is_refused() -> None:
    def writing(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s -= t
        return s.square().mean(-1)

    with pytest.raises(ValueError, match="writing fails on two tensors"):
        check_row_function(writing, (2, 3), "ours")


def test_a_loss_with_parameters_is_refused() -> None:
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.scale * (s - t).square().mean(-1)

    with pytest.raises(ValueError, match="Weighted has parameters, which nobody would train"):
        check_row_function(Weighted(), (2, 3), "ours")


def test_numbers_below_the_least_are_refused() -> None:
    check_least("Contrastive: queue", 0, 0)
    check_least("Contrastive: most", None, 2)
    with pytest.raises(ValueError, match=r"most is 1.*2"):
        check_least("Contrastive: most", 1, 2)
