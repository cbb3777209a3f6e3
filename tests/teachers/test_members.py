"""Members of several teachers: what they are, and turns on one device."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from llm_distill import Ensemble, Local, Routed
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.losses.sparse import TopK
from llm_distill.rows import Batch
from llm_distill.signals import Dense, Factored, Request, Signals
from llm_distill.teachers import has_device_map, leaves, members
from llm_distill.teachers.members import (
    HOME,
    Turn,
    as_teachers,
    common_spec,
    opened,
    part_of,
)
from tests import tiny
from tests.teachers.test_local import batch

CPU = torch.device("cpu")
LOGITS = Request(logits=True)
DEVICE = torch.device("meta")
"""Stands for a GPU: nothing is computed on it here."""


def quantised() -> Any:
    """A model whose checkpoint was quantised."""
    model = tiny.llama("teacher")
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


class Placed(nn.Module):
    """Weights that know where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.place = DEVICE

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        del args, kwargs
        self.place = device
        return self


class Remembering:
    """A source that writes down where all weights were when it was asked."""

    def __init__(self, everybody: list[nn.Module], seen: list[list[torch.device]]) -> None:
        self.model: Any = Placed()
        everybody.append(self.model)
        self._everybody, self._seen = everybody, seen
        self.told = ("here",)

    def prepare(self, batches: Sequence[Batch]) -> None:
        del batches
        self.look()

    def __call__(self, batch: Batch) -> Signals:
        del batch
        self.look()
        return Signals("x")

    def ask(self, request: Request) -> None:
        del request
        self.look()

    def look(self) -> None:
        self._seen.append([model.place for model in self._everybody])  # type: ignore[misc]

    def close(self) -> None:
        self.model = None


def test_one_set_of_weights_is_on_the_device_at_a_time() -> None:
    everybody: list[nn.Module] = []
    seen: list[list[torch.device]] = []
    sources = [Turn(Remembering(everybody, seen), DEVICE) for _ in range(3)]
    assert [model.place for model in everybody] == [HOME] * 3
    for source in sources:
        source(batch())
    for source in sources:
        source.ask(Request())
    own = [[DEVICE if k == j else HOME for j in range(3)] for k in range(3)]
    assert seen == own * 2
    assert [model.place for model in everybody] == [HOME] * 3
    sources[0].close()
    assert sources[0].model is None


def test_weights_go_home_after_an_error() -> None:
    source = Remembering([], [])
    turn = Turn(source, DEVICE)
    source.look = lambda: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(ZeroDivisionError):
        turn(batch())
    assert source.model.place == HOME


def test_what_was_said_outlives_the_turn() -> None:
    """A module that moves exchanges the data of its parameters: a head in use must not move."""
    model = tiny.llama("teacher")
    member = opened(Local(model), Request(logits=True), CPU, turns=True)
    part: Any = part_of(member(batch()), "x")
    assert part.weight.data_ptr() == model.lm_head.weight.data_ptr()
    model.lm_head.weight.data = torch.zeros(1)  # as a move would
    assert part.weight.shape == (tiny.VOCABULARY, 64)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (Local("an/id", device_map="auto"), "turns: an/id has a device_map, which keeps"),
        (Local("an/id", shard="fsdp2"), "turns: an/id lies in pieces .* write shard: replica"),
        (
            Ensemble([tiny.llama("teacher"), Local("an/id", shard="tp")]),
            "turns: an/id lies in pieces",
        ),
        (Local(quantised()), "turns: LlamaForCausalLM is quantised, .* leave turns out, or take"),
    ],
)
def test_what_cannot_leave_takes_no_turns(member: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(member, Request(), CPU, turns=True)
    pair = Ensemble([Local(tiny.llama("teacher")), member], turns=True)
    with pytest.raises(InputError, match=message):
        pair.check(Request(), CPU)
    with pytest.raises(InputError, match=message):
        Routed({"a": tiny.llama("teacher"), "b": member}, by="kind", turns=True).check(
            Request(), CPU
        )


def test_what_members_are_made_of_takes_turns_too() -> None:
    a, b = Local(tiny.llama("teacher")), Local(tiny.llama("other"))
    inner = opened(Ensemble([a, Routed({"x": a, "y": b}, by="kind")]), LOGITS, CPU, turns=True)
    first, second = inner.sources  # type: ignore[attr-defined]
    assert [type(s) for s in (first, *second.sources)] == [Turn, Turn, Turn]
    alone = opened(Ensemble([a, b]), LOGITS, CPU, turns=False)
    assert not any(isinstance(s, Turn) for s in alone.sources)  # type: ignore[attr-defined]


def test_what_turned_out_to_lie_in_pieces_takes_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `auto` may decide."""
    monkeypatch.setattr(members, "in_pieces", lambda model: model is not None)
    with pytest.raises(InputError, match="LlamaForCausalLM lies in pieces on several processes"):
        opened(Local(tiny.llama("teacher")), Request(logits=True), CPU, turns=True)


def test_leaves() -> None:
    a, b, c = (Local(f"an/{k}") for k in "abc")
    assert leaves(a) == (a,)
    assert leaves(Ensemble([a, Ensemble([b, c])])) == (a, b, c)


def test_ids_are_local_models(teacher: Any) -> None:
    assert as_teachers("X", ["a/b", Local("c/d")]) == (Local("a/b"), Local("c/d"))
    for given in ([], ["a/b"], "a/b", None):
        with pytest.raises(InputError, match="are no several teachers; give a list of two or more"):
            as_teachers("X", given)  # type: ignore[arg-type]
    assert as_teachers("X", [teacher, "a/b"])[0] == Local(teacher)
    with pytest.raises(InputError, match="int is no model; give a Hub id"):
        as_teachers("X", [3, "a/b"])  # type: ignore[list-item]


def test_a_common_spec_has_what_all_have() -> None:
    one, two = Local(tiny.llama("teacher")).spec, Local(tiny.llama("teacher", vocabulary=99)).spec
    made = common_spec("Ensemble", [one, two])
    assert (made.vocabulary, made.depth, made.positions) == (99, 4, tiny.POSITIONS)
    assert made.name == "Ensemble(LlamaForCausalLM, LlamaForCausalLM)"


def test_what_can_be_combined() -> None:
    values = torch.zeros(2, 5)
    assert part_of(Signals("a", Dense(values)), "x") is values
    with pytest.raises(ValueError, match="x combines whole distributions, and its member a gives "):
        part_of(Signals("a", TopK.of(values, 2)), "x")


def test_a_head_stays_when_its_model_moves_on() -> None:
    """On one device only a simulated move shows it: the home of weights is float64 here."""
    member: Any = Local(tiny.bert()).open(Request(logits=True), torch.device("cpu"))
    turn = Turn(member, torch.device("cpu"))
    collate = RowCollator(Collator(pad_token_id=0), shift=False, valid=False)
    given = make_batch(collate([tiny.rows()[0]]), None, seed=0, epoch=0)
    said = turn(given)
    member.model.to(torch.float64)
    assert isinstance(said.distribution, Factored)
    head = said.distribution.head
    assert head.transform is None
    assert head.weight.dtype == said.distribution.hidden.dtype == torch.float32
    logits = said.distribution.logits(slice(None))
    whole = Local(tiny.bert()).open(Request(logits=True), CPU)(given)
    torch.testing.assert_close(logits, whole.whole.logits(slice(None)))


def test_any_member_may_lie_on_several_devices() -> None:
    spread, whole = Local("a/b", device_map="auto"), Local("a/c")
    assert has_device_map(Ensemble([whole, spread]))
    assert not has_device_map(Ensemble([whole, whole]))
