"""Frames at capture: from tokens of all the data, and of no more than are needed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llm_distill import HiddenStates
from llm_distill.cache.frames import Frame
from llm_distill.caching import Capture, framing
from llm_distill.caching.framing import framed
from llm_distill.errors import InputError
from llm_distill.layers import explicit
from llm_distill.signals import Request
from llm_distill.teachers import Source
from tests import caches, tiny

HINT = HiddenStates(layers=partial(explicit, pairs=[[1, 2], [2, 4]]), rows="valid")


def opened(made: Capture) -> Source:
    assert made.layers is not None
    request = Request(logits=True, hidden=frozenset(made.layers.layers))
    return made.run.teacher.open(request, made.args.device)


def states(made: Capture, layer: int) -> torch.Tensor:
    """Of all tokens of the training data."""
    teacher, found = tiny.llama("teacher"), []
    for row in made.datasets["train"]:
        with torch.no_grad():
            out = teacher(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        found.append(out.hidden_states[layer][0])
    return torch.cat(found)


@pytest.mark.parametrize("width", [None, 5])
def test_all_tokens_of_a_few_examples(tmp_path: Path, width: int | None) -> None:
    made = caches.capture(tmp_path, hints=[HINT], width=width)
    found = framed(made, opened(made))
    assert list(found) == [2, 4]
    for layer, frame in found.items():
        exact = Frame.of(states(made, layer), width)
        assert torch.allclose(frame.centre, exact.centre, atol=1e-4)
        assert torch.allclose(frame.scale, exact.scale, rtol=1e-3)
        assert (frame.basis is None) == (width is None)


def test_no_more_than_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "EXAMPLES", 6)
    monkeypatch.setattr(framing, "TOKENS", 18)
    seen: list[torch.Tensor] = []

    def noted(given: torch.Tensor, width: int | None) -> torch.Tensor:
        assert width is None
        seen.append(given)
        return given

    monkeypatch.setattr(Frame, "of", noted)
    made = caches.capture(tmp_path, hints=[HINT])
    framed(made, opened(made))
    assert len(seen) == 2
    assert 15 <= len(seen[0]) <= 24
    every = states(made, 2)
    where = [int((every - row).abs().sum(1).argmin()) for row in seen[0]]
    assert min(where) < len(every) / 6
    assert max(where) > 0.7 * len(every)


def test_too_few_tokens_for_so_many_directions(tmp_path: Path) -> None:
    few = tiny.rows(32).select([0])
    made = caches.capture(tmp_path, hints=[HINT], width=50, train_dataset=few, eval_dataset=None)
    with pytest.raises(InputError, match=r"states_width is 50, and \d+ tokens of the train data"):
        framed(made, opened(made))


def test_nothing_where_no_states_are_kept(tmp_path: Path) -> None:
    made = caches.capture(tmp_path)
    source = made.run.teacher.open(Request(logits=True), made.args.device)
    assert framed(made, source) == {}


def test_the_example_whose_states_are_no_numbers(tmp_path: Path) -> None:
    """Of the one that has them: a median of NaN would be at fault in all."""
    made = caches.capture(tmp_path, hints=[HINT])
    source = opened(made)
    asked: list[int] = []

    def broken(given: Any) -> Any:
        said = source(given)
        asked.append(len(given.inputs["input_ids"]))
        if len(asked) < 2:
            return said
        return replace(said, states={k: v * torch.nan for k, v in said.states.items()})

    message = r"example 4: hidden state \d of the teacher: .* leave it out, or states: false"
    with pytest.raises(InputError, match=message):
        framed(made, cast("Source", broken))
