"""The second engine's configuration, and what it runs; with DeepSpeed itself in tests/zero3."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llm_distill import loading
from llm_distill.errors import InputError
from llm_distill.placement import load_partitioned
from llm_distill.placement.partitioning import Backbone, engine_config
from llm_distill.placement.sharding import run_backbone
from tests import tiny


def test_an_engine_that_only_reads() -> None:
    model = tiny.llama("teacher")
    config = engine_config(model.config, torch.bfloat16)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 640
    assert config["bf16"] == {"enabled": True}
    assert config["fp16"] == {"enabled": False}
    assert not {"optimizer", "scheduler", "gradient_clipping"} & config.keys()


def test_norms_alone_are_small_enough_to_stay() -> None:
    model = tiny.llama("teacher")
    most = engine_config(model.config, torch.float32)["zero_optimization"]
    small = {n for n, p in model.named_parameters() if p.numel() <= most[KEPT]}
    assert small
    assert all("norm" in name for name in small)


KEPT = "stage3_param_persistence_threshold"


def test_the_root_of_the_engine_runs_the_backbone() -> None:
    model, inputs = tiny.llama("teacher"), tiny.batch()
    ids = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        found = Backbone(model)(**ids).last_hidden_state
        assert torch.equal(found, model.base_model(**ids).last_hidden_state)


def test_a_dtype_without_an_engine_is_refused() -> None:
    config = tiny.llama("teacher").config
    with pytest.raises(InputError, match=r"teacher there: .*, not float64; write dtype: float32"):
        load_partitioned("there", config, dtype="float64")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)],
)
def test_it_is_loaded_for_its_engine_and_runs_under_it(
    asked: Any, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = tiny.llama("teacher"), dict[str, Any]()
    model.config.dtype = torch.bfloat16

    def load(name: str, config: Any, **options: Any) -> Any:
        told.update(options, name=name)
        return model

    class Engine(nn.Module):
        def __init__(self, root: nn.Module) -> None:
            super().__init__()
            self.root = root

        def forward(self, **inputs: Any) -> Any:
            return self.root(**inputs)

    def initialize(*, model: nn.Module, config: Any) -> Any:
        told["initialized"] = config
        return Engine(model), None, None, None

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize))
    found = load_partitioned("there", model.config, dtype=asked)
    assert found is model
    assert told["dtype"] == expected
    assert told["engine"] == told["initialized"] == engine_config(model.config, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(run_backbone(model), Engine)
    assert "Engine" not in {type(module).__name__ for module in model.modules()}
