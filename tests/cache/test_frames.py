"""Frames: medians and spreads that outliers do not move, and the directions of most variance."""

import statistics
from pathlib import Path

import torch
from torch import Tensor

from llm_distill.cache.frames import NORMAL, Frame, load, save
from llm_distill.coded import Coded


def states(count: int = 301, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    return mixed + torch.randn(width, generator=generator)


def test_medians_and_spreads_of_a_loop() -> None:
    given = states()
    frame = Frame.of(given)
    for k, column in enumerate(given.double().T.tolist()):
        centre = statistics.median(column)
        assert abs(float(frame.centre[k]) - centre) < 1e-6
        around = statistics.median(abs(value - centre) for value in column)
        assert abs(float(frame.scale[k]) - NORMAL * around) < 1e-5
    assert frame.basis is None


def test_sinks_and_features_far_away_do_not_move_it() -> None:
    given = states()
    plain = Frame.of(given)
    given[::50] *= 3000.0
    given[:, 3] += 5000.0
    moved = Frame.of(given)
    assert torch.allclose(moved.scale, plain.scale, rtol=0.2)
    rest = [k for k in range(12) if k != 3]
    assert torch.allclose(moved.centre[rest], plain.centre[rest], atol=0.3)
    assert abs(moved.centre[3] - plain.centre[3] - 5000.0) < 0.5


def test_a_feature_that_stood_still_may_move_later() -> None:
    given = states()
    given[:, 7] = 2.0
    frame = Frame.of(given)
    assert torch.allclose(frame.scale[7], 0.1 * frame.scale.sort().values[5], rtol=0.5)
    given[0, 7] = 4.0
    read = frame.states(Coded.of(frame.numbers(given)).values())
    assert abs(read[0, 7] - 4.0) < 0.2


def test_states_that_are_all_alike() -> None:
    frame = Frame.of(torch.ones(5, 4))
    assert frame.scale.equal(torch.ones(4))
    assert frame.states(frame.numbers(torch.ones(5, 4))).equal(torch.ones(5, 4))


def test_there_and_back() -> None:
    given = states()
    frame = Frame.of(given)
    assert torch.allclose(frame.states(frame.numbers(given)), given, atol=1e-5)
    whole = Frame.of(given, 12)
    assert torch.allclose(whole.states(whole.numbers(given)), given, atol=1e-4)


def test_directions_are_those_of_the_largest_variance() -> None:
    given = states()
    frame = Frame.of(given, 3)
    assert frame.basis is not None
    assert torch.allclose(frame.basis @ frame.basis.T, torch.eye(3), atol=1e-5)
    left = given.double() - given.double().median(0).values
    lost = (frame.states(frame.numbers(given)).double() - given).square().sum()
    values = torch.linalg.svdvals(left)
    assert abs(float(lost / values[3:].square().sum()) - 1) < 1e-4
    cosines = (frame.basis.double() @ torch.linalg.svd(left).Vh[:3].T).abs()
    assert torch.allclose(cosines, torch.eye(3).double(), atol=1e-5)


def test_distances_within_the_directions_stay() -> None:
    given = states()
    frame = Frame.of(given, 4)
    read = frame.states(frame.numbers(given)).double()
    within = (frame.numbers(given) * frame.scale).double()
    apart = (within[:-1] - within[1:]).norm(dim=1)
    assert torch.allclose((read[:-1] - read[1:]).norm(dim=1), apart, rtol=1e-5)


def test_written_and_read(tmp_path: Path) -> None:
    frames = {11: Frame.of(states()), 2: Frame.of(states(), 5)}
    save(frames, tmp_path)
    found = load(tmp_path)
    assert list(found) == [2, 11]
    assert found[11].basis is None
    for layer, frame in frames.items():
        assert found[layer].centre.equal(frame.centre)
        assert found[layer].scale.equal(frame.scale)
    basis = found[2].basis
    assert basis is not None
    assert basis.equal(torch.as_tensor(frames[2].basis))
    assert found[2].to("meta").scale.is_meta
