"""Blocks that start from given states."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill.forcing import Forcing
from tests import tiny


def states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found: Any = model.base_model
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return tuple(found(**inputs, output_hidden_states=True, **cache).hidden_states)


def given() -> dict[str, Tensor]:
    batch = tiny.batch()
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", [*tiny.MODELS, "bert"])
class TestForcing:
    def model(self, kind: str) -> Any:
        return tiny.bert() if kind == "bert" else tiny.MODELS[kind]()

    @torch.no_grad()
    def test_a_block_given_its_own_input_makes_its_own_output(self, kind: str) -> None:
        model = self.model(kind)
        forcing = Forcing(model)
        before = states(model, given())
        forcing.give({k + 1: before[k].clone() for k in range(len(before) - 1)})
        forced = states(model, given())
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, forced, strict=True))

    def test_the_state_given_counts_and_the_block_below_does_not(self, kind: str) -> None:
        model = self.model(kind)
        forcing = Forcing(model)
        plain = states(model, given())
        state = (
            plain[1].detach() + torch.linspace(0, 3, 32 if kind != "llama" else 64)
        ).requires_grad_()
        forcing.give({2: state})
        forced = states(model, given())
        assert torch.allclose(forced[1], plain[1])  # what block 1 made, not what block 2 was given
        assert not torch.allclose(forced[2], plain[2])
        forced[2].square().sum().backward()
        assert state.grad is not None
        assert state.grad.any()
        assert model.get_input_embeddings().weight.grad is None
        forcing.release()
        assert torch.allclose(states(model, given())[2], plain[2])


def test_a_checkpointed_block_is_recomputed_from_the_same_state() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.llama("teacher").train()
        forcing = Forcing(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        forcing.give({2: torch.full((3, 12, 64), 0.5)})
        states(model, given())[3].square().sum().backward()
        forcing.release()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    assert all(torch.allclose(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_state_of_another_dtype_becomes_the_models() -> None:
    model = copy.deepcopy(tiny.llama("student")).bfloat16()
    forcing = Forcing(model)
    forcing.give({1: torch.zeros(3, 12, 32)})
    assert states(model, given())[1].dtype == torch.bfloat16
