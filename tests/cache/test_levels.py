"""Log-probabilities in a byte: near, summing to 1, whatever the shape of the distribution."""

import numpy as np
import pytest
import torch

from llm_distill.cache.levels import WIDEST, from_levels, to_levels
from llm_distill.losses.sparse import TopK


def read_back(logits: torch.Tensor, k: int) -> tuple[TopK, np.ndarray, np.ndarray]:
    top = TopK.of(logits.double(), k)
    found, tail = from_levels(*to_levels(top.log_probs.numpy(), top.tail.numpy()))
    return top, found.astype(np.float64), tail.astype(np.float64)


def divergence(top: TopK, log_probs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """KL of the K + 1 buckets, in float64, row by row."""
    told = np.concatenate([top.log_probs.numpy(), top.tail.numpy()[:, None]], 1)
    back = np.concatenate([log_probs, tail[:, None]], 1)
    return np.array(
        [
            sum(np.exp(p) * (p - q) for p, q in zip(row, other, strict=True) if np.exp(p) > 0)
            for row, other in zip(told, back, strict=True)
        ]
    )


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 3.0, 10.0])
def test_near_for_flat_and_sharp_rows(sharpness: float) -> None:
    logits = sharpness * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    top, log_probs, tail = read_back(logits, 50)
    lost = divergence(top, log_probs, tail)
    assert lost.min() > -1e-6  # what fp32 leaves of 1
    assert lost.mean() < 2e-5
    assert np.allclose(np.exp(log_probs).sum(1) + np.exp(tail), 1.0, atol=1e-5)


def test_a_power_law_of_128k_tokens_keeps_the_promise() -> None:
    generator = torch.Generator().manual_seed(1)
    steep = torch.rand(64, 1, generator=generator) * 2 + 0.6
    ranks = torch.arange(1, 128_001).log()
    logits = -steep * ranks + torch.randn(64, 128_000, generator=generator)
    lost = divergence(*read_back(logits, 50))
    assert lost.mean() <= 2e-5


def test_one_token_holds_everything() -> None:
    logits = torch.full((1, 100), -200.0)
    logits[0, 7] = 0.0
    top, log_probs, tail = read_back(logits, 4)
    assert top.ids[0, 0] == 7
    assert log_probs[0, 0] == pytest.approx(0.0, abs=1e-6)
    assert log_probs[0, 1:].max() <= -WIDEST + 0.2
    assert np.isfinite(log_probs).all()
    assert tail[0] == pytest.approx(float(top.tail[0]), rel=1e-3)


def test_forbidden_tokens_among_the_kept_and_no_tail() -> None:
    logits = torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]])
    for k in (3, 4):
        top, log_probs, tail = read_back(logits, k)
        assert np.exp(log_probs[0, :2]) == pytest.approx(
            np.exp(top.log_probs[0, :2].numpy()), rel=5e-3
        )
        assert np.exp(log_probs[0, 2:]).max() < 1e-12
        assert np.exp(tail[0]) == pytest.approx(0.0, abs=1e-7)


def test_equal_tokens_and_a_head_of_next_to_nothing() -> None:
    top, log_probs, tail = read_back(torch.zeros(2, 1_000_000), 2)
    assert log_probs == pytest.approx(top.log_probs.numpy(), abs=0.1)
    assert np.exp(tail) == pytest.approx(1.0, abs=1e-5)
    assert divergence(top, log_probs, tail).max() < 1e-6
