"""What follows the blocks: the last norm, found on every family, and the head at an exit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm_distill.binding import make_batch
from llm_distill.capture import Reader
from llm_distill.collation import RowCollator
from llm_distill.lm_head import head_of, last_norm
from llm_distill.rows import Batch
from llm_distill.signals import Request
from tests import tiny

NORMS = {
    "llama": "model.norm",
    "qwen3": "model.norm",
    "gpt2": "transformer.ln_f",
    "gemma2": "model.norm",
    "gemma3": "model.norm",
}


def batch(*, shift: bool = True) -> Batch:
    made = RowCollator(lambda _: tiny.batch(), shift=shift, valid=False)([])
    return make_batch(made, None, seed=0, epoch=0)


@pytest.mark.parametrize("family", sorted(tiny.MODELS))
def test_an_exit_is_the_model_with_fewer_blocks(family: str) -> None:
    """Norm, head, scale and soft cap are the model's own."""
    model = tiny.MODELS[family]()
    found = Reader(model, Request(exits=frozenset({2})), "x").read(batch())
    logits = found.exits[2].logits(slice(None))
    state = model(**batch().inputs, output_hidden_states=True).hidden_states[2]
    rows = model.get_submodule(NORMS[family])(state).flatten(0, 1)[batch().supervised.index]
    expected = F.linear(rows, model.lm_head.weight)
    cap = model.config.final_logit_softcapping if "gemma" in family else None
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert found.distribution is None


def test_an_encoder_has_no_norm_above_its_blocks() -> None:
    model: Any = tiny.bert()
    given = batch(shift=False)
    logits = Reader(model, Request(exits=frozenset({2})), "x").read(given).exits[2]
    state = model(**given.inputs, output_hidden_states=True).hidden_states[2]
    expected = model.cls(state.flatten(0, 1)[given.supervised.index])
    torch.testing.assert_close(logits.logits(slice(None)), expected, rtol=1e-5, atol=1e-5)


def test_it_is_looked_for_only_where_somebody_asks() -> None:
    model = tiny.llama("student")
    for asked in (False, True):
        with last_norm(model, asked=asked) as found:
            last = model.model(**tiny.batch()).last_hidden_state
        assert (found.get(last.data_ptr()) is model.model.norm) == asked
        assert not model.model.norm._forward_hooks


def test_a_layer_below_the_last_has_the_same_head() -> None:
    """At the last layer an exit would be the model itself."""
    model = tiny.llama("student")
    request = Request(logits=True, hidden=frozenset({2}), exits=frozenset({1}))
    found = Reader(model, request, "x").read(batch())
    rows = found.states[2].flatten(0, 1)[batch().supervised.index]
    expected = head_of(model).logits(rows)
    torch.testing.assert_close(found.whole.logits(slice(None)), expected)
    assert not torch.allclose(found.exits[1].logits(slice(None)), expected)
