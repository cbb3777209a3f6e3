"""Numbers in 8 bit: each against a loop in float64."""

import math

import pytest
import torch

from llm_distill.coded import BLOCK, Coded, blocks_of


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_a_loop_gives_the_same_codes(width: int) -> None:
    values = rows(7, width)
    values[3] = 0.0
    coded = Coded.of(values)
    assert coded.codes.shape == (7, width)
    assert coded.scales.shape == (7, blocks_of(width))
    assert (coded.codes.dtype, coded.scales.dtype) == (torch.int8, torch.bfloat16)
    read = coded.values()
    for k, row in enumerate(values.double().tolist()):
        for start in range(0, width, BLOCK):
            block = row[start : start + BLOCK]
            step = float(coded.scales[k, start // BLOCK])
            largest = max(map(abs, block)) / 127
            assert largest <= step <= largest * (1 + 2**-7)
            for place, value in enumerate(block, start):
                nearest = round(value / step) if step else 0
                code = int(coded.codes[k, place])
                assert abs(code - nearest) <= (abs(value / (step or 1) % 1 - 0.5) < 1e-5)
                assert read[k, place].item() == code * step
                assert abs(code * step - value) <= step / 2 * (1 + 1e-5)


def test_a_large_number_costs_its_block_alone() -> None:
    values = rows(4, 4 * BLOCK)
    exact = Coded.of(values).values()
    values[:, 5] = 4000.0
    read = Coded.of(values).values()
    assert torch.equal(read[:, BLOCK:], exact[:, BLOCK:])
    assert (read[:, :5] == 0).all()
    assert (read[:, 5] - 4000.0).abs().max() < 16


def test_sizes_from_the_least_to_the_largest() -> None:
    values = rows(60, 70) * torch.logspace(-30, 30, 60)[:, None]
    read = Coded.of(values).values()
    error = (read - values).abs().amax(1) / values.abs().amax(1)
    assert error.max() < 1 / 250


def test_nothing() -> None:
    for shape in ((0, 5), (3, 5)):
        coded = Coded.of(torch.zeros(shape))
        assert coded.values().equal(torch.zeros(shape))
        assert len(coded) == shape[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_code(value: float) -> None:
    values = torch.zeros(2, 3)
    values[1, 2] = value
    with pytest.raises(ValueError, match="numbers that are not finite have no code"):
        Coded.of(values)


def test_some_rows_and_elsewhere() -> None:
    coded = Coded.of(rows(5, 70))
    few = coded.rows(slice(1, 3))
    assert few.values().equal(coded.values()[1:3])
    moved = coded.to("meta", non_blocking=True)
    assert moved.codes.is_meta
    assert moved.scales.is_meta
