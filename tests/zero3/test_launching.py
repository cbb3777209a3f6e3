"""The shipped launcher configuration, a recipe through the command line, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_distill.recipe import document
from tests import on_disk
from tests.zero3.engine import ROOT, launch, needs_deepspeed

pytestmark = [
    needs_deepspeed,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]


@pytest.mark.parametrize("half", [False, True])
def test_a_recipe_under_the_shipped_configuration(half: bool, tmp_path: Path) -> None:
    """Student in pieces, teacher under an engine of its own, accumulation, an evaluation."""
    models = on_disk.fill(tmp_path / "models")
    content: dict[str, Any] = {
        "student": str(models / "student"),
        "teacher": {"Local": {"model": str(models / "teacher"), "shard": "zero3"}},
        "data": {"path": str(models / "data.jsonl"), "eval": 0.25, "max_length": 32},
        "objectives": ["CrossEntropy", "Logits", "HiddenStates", "AttentionMaps"],
        "training": {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": half,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(document.dump(content))
    shipped = ("--config_file", str(ROOT / "recipes/accelerate/zero3.yaml"))
    asked = (*shipped, "--main_process_port", "0", "-m", "llm_distill", "run", str(recipe))
    told = launch("accelerate.commands.launch", *asked, timeout=180)
    assert "zero3, " in told
    assert "on each of 2 processes (as asked)" in told
    assert "under DeepSpeed ZeRO-3 the gate sees no gradients and stays open" in told
    load: Any = AutoModelForCausalLM.from_pretrained
    model, keys = load(tmp_path / "out", output_loading_info=True)
    assert not any(keys.values())
    assert torch.nn.utils.parameters_to_vector(model.parameters()).isfinite().all()
