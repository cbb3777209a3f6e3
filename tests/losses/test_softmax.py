"""Log-probabilities in all precisions, and the sum of the KLs."""

import math

import pytest
import torch

from llm_distill.losses.softmax import FLOOR, kl, log_softmax, wide
from tests import reference
from tests.losses.catalogue import logits


def test_log_probabilities_match_the_reference() -> None:
    rows = logits()[1]
    rows[:, 2] = -math.inf
    expected = torch.tensor([reference.log_softmax(row) for row in rows.numpy()])
    torch.testing.assert_close(log_softmax(rows), expected.clamp_min(FLOOR).double())


def test_a_row_that_forbids_everything_is_uniform() -> None:
    nothing = torch.full((1, 4), -math.inf)
    torch.testing.assert_close(log_softmax(nothing), torch.full((1, 4), -math.log(4.0)))


def test_a_forbidden_token_has_no_mass_and_no_gradient() -> None:
    row = torch.tensor([[1.0, -math.inf, 2.0]], requires_grad=True)
    log_probs = log_softmax(row)
    assert log_probs[0, 1] == FLOOR
    assert log_probs.exp()[0, 1] == 0
    log_probs[0, 0].backward()
    assert row.grad is not None
    assert row.grad[0, 1] == 0
    assert row.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_nothing_is_computed_in_less_than_fp32(dtype: torch.dtype, expected: torch.dtype) -> None:
    rows = torch.zeros(2, 3, dtype=dtype)
    assert wide(rows).dtype == log_softmax(rows).dtype == expected


def test_kl_matches_the_reference() -> None:
    student, teacher = logits()
    log_p, log_q = (torch.log_softmax(z.detach(), -1) for z in (teacher, student))
    pairs = zip(log_p.tolist(), log_q.tolist(), strict=True)
    expected = torch.tensor([reference.kl(a, b) for a, b in pairs], dtype=torch.float64)
    assert expected.min() > 1e-3
    torch.testing.assert_close(kl(log_p, log_q), expected)
