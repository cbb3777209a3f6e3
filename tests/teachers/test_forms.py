"""What members tell of a row."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_distill import Cached, Ensemble, Local, Remote, Routed
from llm_distill.cache import estimators
from llm_distill.errors import InputError
from llm_distill.signals import Request
from llm_distill.teachers.forms import UNKNOWN, form_of
from tests import caches, tiny

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Own:
    """A teacher of the user's own."""

    like: Local

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)

    def open(self, request: Request, device: torch.device) -> Any:
        return self.like.open(request, device)


class TestForms:
    """What members tell of a row, known before any weights load."""

    @pytest.fixture
    def top(self, tmp_path: Path) -> Cached:
        return Cached(caches.written(tmp_path / "top", partial(estimators.topk, k=4)))

    @pytest.fixture
    def drawn(self, tmp_path: Path) -> Cached:
        return Cached(caches.written(tmp_path / "drawn", partial(estimators.sampled, n=4)))

    @pytest.fixture
    def whole(self, tmp_path: Path) -> Cached:
        return Cached(caches.written(tmp_path / "whole", estimators.hidden))

    def test_of_one(self, top: Cached, drawn: Cached, whole: Cached) -> None:
        assert form_of(Local("an/id")) is None
        assert form_of(top) == form_of(Remote("http://x", "an/id", 4)) == "the likeliest 4"
        assert form_of(drawn) == str(drawn.store.manifest.estimator)
        assert form_of(whole) is None

    def test_an_ensemble_tells_all_or_few(self, top: Cached, drawn: Cached, whole: Cached) -> None:
        request, local = Request(logits=True), Local(tiny.llama("teacher"))
        assert form_of(Ensemble([whole, local])) is None
        pair = Ensemble([top, drawn])
        assert str(form_of(pair)).startswith("several (the likeliest 4; ")
        pair.check(request, CPU)
        with pytest.raises(InputError, match="tells the likeliest 4, LlamaForCausalLM tells all"):
            Ensemble([top, local]).check(request, CPU)
        Ensemble([top, local]).check(Request(), CPU)
        with pytest.raises(InputError, match="mode: logit_mean combines whole distributions"):
            Ensemble([top, drawn], mode="logit_mean").check(request, CPU)
        with pytest.raises(InputError, match="Ensemble: confidence combines whole distributions"):
            Ensemble([top, drawn], confidence="entropy").check(request, CPU)

    def test_experts_tell_alike(self, top: Cached, drawn: Cached, tmp_path: Path) -> None:
        request = Request(logits=True)
        other = Cached(caches.written(tmp_path / "other", partial(estimators.topk, k=5)))
        assert form_of(Routed({"a": top, "b": top}, by="kind")) == "the likeliest 4"
        for expert in (other, drawn, Ensemble([top, top])):
            with pytest.raises(InputError, match=r"tell a few tokens of each row \(a: the likel"):
                Routed({"a": top, "b": expert}, by="kind").check(request, CPU)
        with pytest.raises(InputError, match="Routed: its experts tell a few tokens"):
            Routed({"a": drawn, "b": drawn}, by="kind").check(request, CPU)

    def test_what_nobody_knows_is_heard_first(self, top: Cached, drawn: Cached) -> None:
        own: Any = Own(Local(tiny.llama("teacher")))
        assert form_of(own) == UNKNOWN
        for other in (top, Local(tiny.llama("teacher"))):
            assert form_of(Ensemble([own, other])) == UNKNOWN
        assert form_of(Ensemble([own, top], mode="logit_mean")) == UNKNOWN
        assert form_of(Routed({"a": own, "b": drawn}, by="kind")) == UNKNOWN
        with pytest.raises(InputError, match="the two cannot be one distribution"):
            form_of(Ensemble([own, top, Local(tiny.llama("teacher"))]))
