"""Fewer bits: the words, what each needs, and that sizes are those of the loaded model."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from llm_distill import Local, quantising
from llm_distill.errors import InputError
from llm_distill.lm_head import head_of
from llm_distill.placement import dtype_of, facts_of, skeleton
from llm_distill.quantising import KINDS, Quantize
from llm_distill.signals import Request
from tests import tiny

CPU = torch.device("cpu")
HERE = ("bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8")
"""What a CPU can do."""

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.llama("teacher"),
    "tied": lambda: tiny.llama("teacher", tied=True),
    "qwen3": lambda: tiny.qwen3(width=64),
    "gpt2": lambda: tiny.gpt2(width=64),
    "bert": lambda: tiny.bert(width=64),
    "gemma2": lambda: tiny.gemma2(width=64),
}

CASES = [(f, w) for f in FAMILIES for w in HERE if (f, w) != ("gpt2", "torchao_int8")]


def loaded(folder: Path, family: str, word: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers, quantised by what we say."""
    FAMILIES[family]().save_pretrained(folder)
    auto: Any = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantising.settings(word, dtype),
        device_map={"": CPU},
    )


def parts(tensor: Any) -> list[Any]:
    """The plain tensors that one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [
        part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))
    ]


def is_quantised(weight: Any) -> bool:
    """By what the libraries call them."""
    return type(weight).__name__ in ("Int8Params", "Params4bit", "Int8Tensor")


def test_every_word_has_a_kind() -> None:
    assert set(get_args(Quantize)) == set(KINDS)


@pytest.mark.parametrize(("family", "word"), CASES)
def test_the_layers_that_are_named_are_those_that_are_quantised(
    family: str, word: str, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    names = {
        id(module.weight): name for name, module in model.named_modules() if has_weight(module)
    }
    named = {names[id(weight)] for weight, _ in quantising.layers(word, model)}
    found = loaded(tmp_path, family, word)
    there = {n for n, m in found.named_modules() if has_weight(m) and is_quantised(m.weight)}
    assert named == there
    assert len(named) >= 4 * model.config.num_hidden_layers


def has_weight(module: nn.Module) -> bool:
    """Whether a module holds a weight itself."""
    return "weight" in module._parameters and module._parameters["weight"] is not None


@pytest.mark.parametrize(("family", "word"), CASES)
def test_sizes_are_those_of_the_loaded_model(family: str, word: str, tmp_path: Path) -> None:
    found = loaded(tmp_path, family, word, torch.bfloat16)
    tensors = {id(p): p for p in found.parameters()}.values()
    taken = sum(t.numel() * t.element_size() for p in tensors for t in parts(p.data))
    for module in found.modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ == "Int8Params":
            taken += weight.SCB.numel() * weight.SCB.element_size()
        if type(weight).__name__ == "Params4bit":
            scales = (weight.quant_state.absmax, weight.quant_state.state2.absmax)
            taken += sum(t.numel() * t.element_size() for t in scales)
    facts = facts_of(found.config.__class__(**plain_config(found)), "m", dtype="bfloat16")
    small = facts_of(FAMILIES[family]().config, "m", dtype="bfloat16", quantize=word)
    assert small.size == pytest.approx(taken, rel=0.01)
    assert small.size < 0.9 * facts.size
    assert small.quantised
    assert not small.travels


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """A config as it was before the model was quantised."""
    return {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}


@pytest.mark.parametrize(("family", "word"), CASES)
def test_the_head_stays_whole(family: str, word: str, tmp_path: Path) -> None:
    whole, found = FAMILIES[family](), loaded(tmp_path, family, word)
    assert torch.equal(head_of(found).weight, head_of(whole).weight)
    assert type(found.get_output_embeddings()) is nn.Linear
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    again = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert tied == again


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quantize": "int8"}, "quantize is 'int8'; write one of bitsandbytes_8bit, bitsand"),
            (
                {"quantize": "torchao_float8", "dtype": "float32"},
                "dtype='float32': what is not quantised is computed in bfloat16; leave dtype out",
            ),
            (
                {"quantize": "bitsandbytes_4bit", "dtype": "float64"},
                "computed in float32 or bfloat16 or float16; leave dtype out",
            ),
            (
                {"quantize": "torchao_int8", "model": tiny.llama("student")},
                "this one is loaded; give its id or path, or quantise it as you load it",
            ),
            *(
                ({"quantize": "torchao_int8", "shard": shard}, "in pieces; write shard: replica")
                for shard in ("fsdp2", "hsdp", "tp")
            ),
        ],
    )
    def test_by_the_spec_alone(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Local(**{"model": "an/id"} | changes)

    def test_what_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quantising, "is_torchao_available", lambda: False)
        bare = skeleton(tiny.llama("teacher").config)
        quantising.check("bitsandbytes_8bit", bare, "m", CPU)
        with pytest.raises(InputError, match=r"torchao.*; pip install 'llm-distill\[quantize\]'"):
            quantising.check("torchao_int8", bare, "m", CPU)

    @pytest.mark.parametrize(
        ("word", "instead"),
        [("torchao_int4", "bitsandbytes_4bit"), ("torchao_float8", "torchao_int8")],
    )
    def test_what_needs_a_gpu(
        self, word: str, instead: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bare = skeleton(tiny.llama("teacher").config)
        with pytest.raises(InputError, match=f"trains on cpu; write {instead}"):
            quantising.check(word, bare, "m", CPU)
        gpu = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(InputError, match=r"or newer, and this process trains on one of 7\.5"):
            quantising.check(word, bare, "m", gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        quantising.check(word, bare, "m", gpu)

    def test_a_checkpoint_that_is_quantised(self, tmp_path: Path) -> None:
        loaded(tmp_path / "whole", "llama", "bitsandbytes_8bit").save_pretrained(tmp_path / "small")
        given = Local(str(tmp_path / "small"), quantize="bitsandbytes_4bit")
        with pytest.raises(InputError, match="is quantised already; leave quantize out"):
            given.check(Request(logits=True), CPU)

    def test_a_model_of_which_nothing_would_be_quantised(self) -> None:
        bare = skeleton(tiny.gpt2().config)
        with pytest.raises(InputError, match="no linear layers that torchao takes; write bitsan"):
            quantising.check("torchao_int8", bare, "m", CPU)

    def test_shapes_that_a_cpu_cannot_pack(self) -> None:
        bare = skeleton(tiny.gpt2().config)
        with pytest.raises(InputError, match="there is one of 32 and 96; write bitsandbytes_8bit"):
            quantising.check("bitsandbytes_4bit", bare, "m", CPU)

    def test_parts_in_memory_or_on_disk(self) -> None:
        bare = skeleton(tiny.llama("teacher").config)
        for places in ({"": "cpu"}, {"model": 0, "lm_head": 1}, "auto", None):
            quantising.check("torchao_int8", bare, "m", CPU, places)
        with pytest.raises(InputError, match="leave device_map out, or spread it over GPUs alone"):
            quantising.check("torchao_int8", bare, "m", CPU, {"model": 0, "lm_head": "disk"})


class TestSettings:
    @pytest.mark.parametrize("word", sorted(KINDS))
    def test_the_compiler_is_left_alone(self, word: str) -> None:
        found: Any = quantising.settings(word, torch.bfloat16)
        assert not getattr(getattr(found, "quant_type", None), "set_inductor_config", False)

    def test_four_bits_are_computed_in_the_dtype_of_the_rest(self) -> None:
        found: Any = quantising.settings("bitsandbytes_4bit", torch.bfloat16)
        assert found.bnb_4bit_compute_dtype is torch.bfloat16
        assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)

    def test_casts_are_not_told_of_every_product(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = loaded(tmp_path, "llama", "bitsandbytes_8bit", torch.bfloat16)
        with caplog.at_level(logging.WARNING), torch.no_grad():
            model(input_ids=torch.arange(9)[None])
        assert "inputs will be cast" not in caplog.text

    def test_dtypes(self) -> None:
        config = tiny.llama("teacher").config
        assert dtype_of(config, "bfloat16") is torch.bfloat16
        config.dtype = "float16"
        assert dtype_of(config, "auto") is torch.float16
        config.dtype = None
        assert dtype_of(config, "auto") is torch.float32
