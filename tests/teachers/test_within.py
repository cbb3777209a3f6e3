"""Sources inside the distiller: what they share and what they leave behind."""

import pytest
import torch
from torch import nn

from llm_distill.signals import Dense, Factored, Head, Request, Signals
from llm_distill.teachers.within import Copy, Within, at_rest, detached, settled
from tests import tiny
from tests.teachers.test_local import batch

LOGITS = Request(logits=True)


def test_a_copy_stays_at_rest() -> None:
    source = Copy(tiny.llama("student").train(), LOGITS, "x")
    assert not source.train().training
    assert not any(module.training for module in source.modules())
    assert not source(batch()).whole.logits(slice(None)).requires_grad


def test_a_copy_is_asked_and_closed() -> None:
    source = Copy(tiny.llama("student"), LOGITS, "x")
    source.ask(Request(hidden=frozenset({1})))
    assert set(source(batch()).states) == {1}
    with pytest.raises(ValueError, match=r"hidden state 3 is out of range 0..2"):
        source.ask(Request(hidden=frozenset({3})))
    source.close()
    with pytest.raises(RuntimeError, match="closed; open it again"):
        source.ask(LOGITS)


def test_only_what_moves_is_learned() -> None:
    student = tiny.llama("student")
    student.lm_head.weight.requires_grad_(requires_grad=False)
    assert Copy(tiny.llama("student"), LOGITS, "x").learned() == {}
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    source = Copy(student, LOGITS, "x", decay=0.5)
    assert set(source.learned()) == names
    assert "lm_head.weight" not in names


def test_a_copy_without_a_decay_does_not_move() -> None:
    source, other = Copy(tiny.llama("student"), LOGITS, "x"), tiny.llama("student")
    with torch.no_grad():
        other.lm_head.weight.zero_()
    source.after_step(other)
    assert torch.equal(source.model.lm_head.weight, tiny.llama("student").lm_head.weight)  # type: ignore[union-attr]


def test_modules_are_as_they_were() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval())).train()
    model[1][0].eval()  # type: ignore[index]
    before = [module.training for module in model.modules()]
    with at_rest(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), at_rest(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_there_is_nothing_to_give_back_without_shards() -> None:
    settled(nn.Linear(2, 2))


def test_detached_signals_have_no_gradient() -> None:
    weight, bias = (torch.ones(*shape, requires_grad=True) for shape in ((5, 3), (5,)))
    hidden = torch.ones(2, 3, requires_grad=True)
    state = torch.ones(1, 2, 3, requires_grad=True)
    said = Signals("x", Factored(hidden, Head(weight, bias)), {1: state, 2: state})
    found = detached(said, Request(logits=True, hidden=frozenset({2})))
    assert set(found.states) == {2}
    assert not found.states[2].requires_grad
    assert not found.whole.logits(slice(None)).requires_grad
    assert detached(said, Request()).distribution is None
    dense = Signals("x", Dense(torch.ones(2, 5)))
    assert isinstance(detached(dense, LOGITS).distribution, Dense)


def test_the_contract_has_to_be_kept() -> None:
    bare = Within()
    with pytest.raises(NotImplementedError):
        bare.ask(LOGITS)
    assert bare.learned() == {}
