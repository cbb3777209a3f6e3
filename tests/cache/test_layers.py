"""Kept hidden states: as bytes and back, whatever is far larger than the rest."""

import json

import pytest
import torch
from torch import Tensor

from llm_distill.cache.encoded import Encoded
from llm_distill.cache.frames import Frame
from llm_distill.cache.layers import Layers, coded

KEPT = Layers((2, 5), "supervised", 96, 96)


def planted(count: int, *, far: bool = True, seed: int = 0) -> Tensor:
    """States like those of a language model: far features, wide ones, and attention sinks."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, 96, generator=generator)
    if far:
        found[:, 17] += 800.0
        found[:, 40] *= 60.0
        found[::64, 5] = 4000.0
    return found


def frames(width: int | None = None) -> dict[int, Frame]:
    return {layer: Frame.of(planted(640, seed=layer), width) for layer in KEPT.layers}


def test_bytes_and_back() -> None:
    given = {layer: planted(100, seed=layer + 10) for layer in KEPT.layers}
    known = frames()
    found, lost = KEPT.encode(given, known)
    assert tuple(found) == KEPT.columns
    assert sum(column.nbytes for column in found.values()) == KEPT.token_bytes * 100
    examples = [Encoded(100, 0, found)] * 2
    for layer in KEPT.layers:
        read = coded(examples, layer, 96)
        states = known[layer].states(read.values())
        assert states.shape == (200, 96)
        assert states[:100].equal(states[100:])
        exact = given[layer].double()
        away = (exact - known[layer].centre).square().sum(1)
        error = (states[:100].double() - exact).square().sum(1) / away
        assert lost[layer].tokens == 100
        assert lost[layer].mean == pytest.approx(float(error.mean()), rel=1e-6)
        assert lost[layer].worst == pytest.approx(float(error.max()), rel=1e-6)
        assert lost[layer].mean < 3e-4


def test_every_feature_is_heard() -> None:
    """A single scale for a token would leave nothing of the features that are not far away."""
    given, known = planted(128, seed=9), frames()[2]
    few = Layers((2,), "valid", 96, 96)
    found, _ = few.encode({2: given}, {2: known})
    read = known.states(coded([Encoded(0, 0, found)], 2, 96).values())
    plain = torch.arange(128) % 64 != 0  # no sinks
    error = (read - given)[plain].square().mean(0) / given[plain].var(0)
    assert error.max() < 5e-4
    step = given.abs().amax(1, keepdim=True) / 127
    naive = (given / step).round() * step
    lost = (naive - given)[plain].square().mean(0) / given[plain].var(0)
    assert lost.median() > 0.5


def test_no_examples() -> None:
    assert coded([], 2, 96).values().shape == (0, 96)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_numbers(value: float) -> None:
    given = {layer: planted(3) for layer in KEPT.layers}
    given[5][1, 1] = value
    with pytest.raises(ValueError, match="hidden state 5 of the teacher: numbers that are not"):
        KEPT.encode(given, frames())


def test_as_a_manifest_has_it() -> None:
    assert Layers.read(json.loads(json.dumps(KEPT.written()))) == KEPT
    assert str(KEPT) == "hidden states 2, 5 of supervised tokens, 96 numbers in 8 bit"
    assert not KEPT.projected
    few = Layers((3,), "valid", 4096, 256)
    assert few.projected
    assert few.token_bytes == 256 + 2 * 4
    assert few.frame_bytes == 4 * (4096 + 256 + 256 * 4096)
    assert KEPT.frame_bytes == 4 * 2 * (96 + 96)
