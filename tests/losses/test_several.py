"""Targets of several teachers stay apart, and nested ones are one list."""

import pytest
import torch

from llm_distill.losses.several import Several, each
from llm_distill.losses.sparse import Counts, TopK


def top(rows: int, seed: int) -> TopK:
    draw = torch.Generator().manual_seed(seed)
    return TopK.of(torch.randn(rows, 7, generator=draw), 3)


def test_several_of_several_are_one_list() -> None:
    first, second, third = (top(4, seed) for seed in range(3))
    inner = Several.of([first, second], [0.25, 0.75])
    outer = Several.of([inner, third], [0.8, 0.2])
    assert outer.parts == (first, second, third)
    assert outer.weights == pytest.approx((0.2, 0.6, 0.2))
    assert each(outer) == outer.parts
    assert each(first) == (first,)


def test_some_of_the_rows() -> None:
    drawn = Counts(torch.tensor([[0, 1]] * 4), torch.tensor([[1, 1]] * 4), draws=2)
    few = Several.of([top(4, 0), drawn], [0.5, 0.5]).rows(slice(1, 3))
    assert len(few) == 2
    assert [len(part) for part in few.parts] == [2, 2]
