"""Maps that are decided when a cache is written: those that a training would decide."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llm_distill import Cached, DistillTrainer, HiddenStates, Local, Logits, surveying
from llm_distill.caching import Capture, write_cache
from llm_distill.caching.deciding import decided
from llm_distill.errors import InputError
from llm_distill.layers import cka, explicit, segmentation, transport
from llm_distill.signals import Request
from llm_distill.teachers import Source
from tests import caches, tiny

if TYPE_CHECKING:
    from llm_distill.objectives import Objective


def opened(made: Capture) -> Source:
    request = Request(logits=True) | made.run.opening_request
    return made.run.teacher.open(request, made.args.device)


@pytest.mark.parametrize("strategy", [segmentation, cka, transport])
def test_as_a_training_decides(tmp_path: Path, strategy: object) -> None:
    hint = HiddenStates(layers=strategy)  # type: ignore[arg-type]  # a strategy
    made = caches.capture(tmp_path, hints=[hint])
    found = decided(made, opened(made))
    live = DistillTrainer(
        tiny.llama("student"),
        Local(tiny.llama("teacher"), tokenizer=tiny.tokenizer()),
        [hint, Logits()],
        tiny.arguments(tmp_path / "live"),
        train_dataset=made.datasets["train"],
        processing_class=tiny.tokenizer(),
    )
    mapping = live.run.terms["HiddenStates"].mapping
    assert found.run.terms["HiddenStates"].mapping == mapping
    assert mapping is not None
    assert found.layers is not None
    assert set(found.layers.layers) == mapping.teacher_layers
    assert list(found.maps) == ["HiddenStates"]


def test_nothing_to_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveying, "survey", None)
    by_hand = HiddenStates(layers=partial(explicit, pairs=[[1, 1]]))
    given: list[list[Objective]] = [[], [by_hand]]
    for hints in given:
        made = caches.capture(tmp_path, hints=hints)
        assert decided(made, opened(made)) is made


def test_what_was_decided_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = caches.capture(tmp_path, hints=[HiddenStates()])
    first = write_cache(made)
    calls: list[bool] = []
    survey = surveying.survey

    def counted(*args: object, **settings: object) -> object:
        calls.append(True)
        return survey(*args, **settings)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(surveying, "survey", counted)
    assert decided(made, opened(made)).maps == first.maps
    assert calls == []
    assert decided(made, opened(made), anew=True).maps == first.maps
    assert calls == [True]
    other = caches.capture(tmp_path, hints=[HiddenStates(layers=segmentation)])
    assert decided(other, opened(other)).maps["HiddenStates"]["strategy"] == "segmentation"
    assert calls == [True, True]


def test_a_map_is_that_of_its_objective(tmp_path: Path) -> None:
    hints = [HiddenStates(), HiddenStates(layers=segmentation, name="other")]
    path = caches.written(tmp_path, hints=hints)
    maps = Cached(path).store.manifest.maps
    assert {name: told["strategy"] for name, told in maps.items()} == {
        "HiddenStates": "auto",
        "other": "segmentation",
    }
    with pytest.raises(InputError, match=r"HiddenStates: layers: segmentation looks at the teach"):
        DistillTrainer(
            tiny.llama("student"),
            Cached(path),
            [HiddenStates(layers=segmentation)],
            tiny.arguments(tmp_path),
            train_dataset=tiny.rows(32, empty=(3,)).select(range(3)),
            processing_class=tiny.tokenizer(),
        )
