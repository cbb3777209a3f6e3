"""The benchmark of hidden states, on next to nothing."""

import torch

from scripts.bench import __main__ as command
from scripts.bench import states

SMALL = "cache --vocab 300 --length 130 --examples 2 --repeats 2 --width 128 --rounds 1"


def test_what_each_codec_loses() -> None:
    options = command.parser().parse_args(SMALL.split())
    rows = {row[0]: row[1:] for row in states.measure(options, lambda text: text)}
    assert rows["a scale for a token"][0] == "130"
    assert rows["a scale for 64 numbers"][0] == "132"
    features = {name: float(cells[1]) for name, cells in rows.items()}
    assert features["a scale for a token"] > 0.1
    assert features["ours, all features"] < 1e-4 < features["ours, 64 directions"] < 1
    for name in ("ours, all features", "ours, 64 directions"):
        assert all(float(speed) > 0 for speed in rows[name][4:])


def test_states_have_far_features_and_sinks() -> None:
    made = states.states(256, 120, 3)
    assert made.equal(states.states(256, 120, 3))
    spread = made[1:128].std(0)
    assert spread.amax() > 50 * spread.median()
    assert (made.median(0).values.abs() > 100 * spread.median()).sum() >= 2
    far = (made[:, 24].abs() > 1000 * spread.median()).nonzero()[:, 0]
    assert torch.equal(far, torch.tensor([0, 128]))
