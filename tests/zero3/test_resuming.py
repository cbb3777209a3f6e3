"""Checkpoints of ZeRO-3 resume bit-exact, and what is saved is a plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.resume_worker import STUDENTS
from tests.zero3.engine import launch, needs_deepspeed

pytestmark = [
    needs_deepspeed,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, and what came of each student."""
    folder = tmp_path_factory.mktemp("resuming")
    launch("-m", "tests.zero3_resume_worker", str(folder))
    return folder, torch.load(folder / "resume.pt", weights_only=True)


@pytest.mark.parametrize("kind", STUDENTS)
class TestStudents:
    def test_resuming_changes_nothing(self, results: Any, kind: str) -> None:
        """Two steps and two more are four: student, projectors, every bit."""
        straight, resumed = (results[1][kind][name] for name in ("straight", "resumed"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    def test_what_is_saved_is_plain_and_whole(self, results: Any, kind: str) -> None:
        folder, facts = results
        final, weights = folder / kind / "final", facts[kind]["resumed"]
        if kind == "lora":
            model: Any = PeftModel.from_pretrained(tiny.llama("student"), str(final))
            own = {n: p for n, p in model.named_parameters() if "lora_" in n}
            assert own
        else:
            load: Any = AutoModelForCausalLM.from_pretrained
            model, told = load(final, output_loading_info=True)
            assert not any(told.values())
            own = dict(model.named_parameters())
        for name, weight in own.items():
            assert torch.equal(weight, weights[f"student.{name}"]), name
        assert not (final / "terms.safetensors").exists()

    def test_a_checkpoint_has_the_student_beside_the_pieces(self, results: Any, kind: str) -> None:
        files = results[1][kind]["files"]
        student = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
        assert {student, "terms.safetensors", "global_step2"} <= set(files)
        assert "training_args.bin" not in files


def test_a_checkpoint_of_other_layer_maps_is_refused(results: Any) -> None:
    assert "was trained with other layer maps" in results[1]["other"]


def test_the_best_model_is_loaded(results: Any) -> None:
    best = results[1]["best"]
    assert best["loaded"] == pytest.approx(min(best["scores"]), rel=1e-6)
    assert best["loaded"] < best["scores"][-1]


def test_a_configuration_that_differs_from_the_arguments_is_refused(results: Any) -> None:
    told = results[1]["differs"]
    assert "ds gradient_clipping=1.0 vs hf max_grad_norm=0.0; write auto for each" in told


def test_a_student_of_an_engine_is_not_taken_from_it(results: Any) -> None:
    assert "in the hands of a DeepSpeed engine of before; save it" in results[1]["again"]


def test_an_engine_that_evaluated_does_not_train(results: Any) -> None:
    assert "trains once, and before it evaluates; write eval_on_start" in results[1]["evaluated"]
