"""Targets as columns of bytes, and back."""

import pytest
import torch

from llm_distill.cache import columns
from llm_distill.cache.encoded import Encoded
from llm_distill.losses.sparse import Counts, TopK

V = 500


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def weights(given: Counts) -> torch.Tensor:
    """As a whole distribution: `[N, V]`."""
    dense = torch.zeros(len(given), V)
    return dense.scatter_add_(1, given.ids, given.counts.float() / given.draws)


def test_likeliest_tokens() -> None:
    top = TopK.of(logits(7), 9)
    back = columns.top_of(Encoded(7, 0, columns.of_top(top)), 9)
    order = top.ids.argsort(-1)
    assert torch.equal(back.ids, top.ids.gather(-1, order))
    assert torch.allclose(back.log_probs, top.log_probs.gather(-1, order), atol=0.03)
    assert torch.allclose(back.tail, top.tail, rtol=1e-3)


def test_draws_are_exact() -> None:
    drawn = Counts.sample(logits(7), 40, generator=torch.Generator().manual_seed(0))
    assert (drawn.counts == 0).any()  # rows of different widths
    kept = columns.of_drawn(drawn)
    back = columns.drawn_of(Encoded(7, drawn.ids.shape[1], kept), 40)
    assert torch.equal(weights(back), weights(drawn))
    assert (back.ids.diff(dim=-1) >= 0).all()


def test_rows_of_different_widths_one_after_the_other() -> None:
    narrow = Counts(torch.tensor([[3, 5]]), torch.tensor([[1, 3]]), 4)
    broad = Counts(torch.tensor([[1, 2, 9]]), torch.tensor([[2, 1, 1]]), 4)
    both = columns.joined([narrow, broad])
    assert both.ids.shape == (2, 3)
    assert torch.equal(weights(both), torch.cat([weights(narrow), weights(broad)]))


def test_top_k_one_after_the_other() -> None:
    parts = [TopK.of(logits(3), 4), TopK.of(logits(2, seed=1), 4)]
    both = columns.together(parts)
    assert len(both) == 5
    assert torch.equal(both.tail[3:], parts[1].tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_are_exact_in_any_dtype(dtype: torch.dtype) -> None:
    given = torch.randn(5, 6).to(dtype)
    given[0, 0], given[1, 1] = torch.inf, torch.nan
    back = columns.states_of(columns.of_states(given), 5, dtype)
    assert torch.equal(back.view(torch.uint8), given.view(torch.uint8))
