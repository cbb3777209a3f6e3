"""Teachers made of the student: one result however the batch is split, and bit-exact resuming."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.itself_worker import ADAPTED, DEEP, TEACHERS
from tests.launch import launch
from tests.test_exactness import BOUND, deviation

ENGINES = ("one", "ddp", "fsdp2", "fsdp2_sharded")
FOLLOWING = ("ema", "adapted_ema")

Results = Callable[[str], Any]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers write."""
    return tmp_path_factory.mktemp("itself")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What an engine came to; it is launched when somebody asks first."""

    @cache
    def found(engine: str) -> Any:
        launch("tests.itself_worker", engine, str(folder), ranks=1 if engine == "one" else 2)
        return torch.load(folder / f"{engine}.pt", weights_only=True)

    return found


@pytest.mark.parametrize("kind", [*TEACHERS, DEEP])
@pytest.mark.parametrize("engine", ENGINES)
def test_splittings_agree(results: Results, engine: str, kind: str) -> None:
    """Student and teacher, whose weights are among those compared."""
    reference = results("one")[f"{kind} 8"]
    own = [name for name in reference["weights"] if name.startswith("within.")]
    assert bool(own) == (kind not in ("adapter_off", DEEP))
    for batch in (8, 1 if engine == "one" else 2):
        found = results(engine)[f"{kind} {batch}"]
        assert deviation(reference["weights"], found["weights"]) <= BOUND
        for ours, expected in zip(found["logs"], reference["logs"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_it_starts_as_the_student(results: Results, engine: str, kind: str) -> None:
    """At step 0 there is nothing to learn from itself, and afterwards there is."""
    first, *later = results(engine)[f"{kind} 8"]["logs"]
    assert first["kl"] == first["loss/Logits"] == first["loss/HiddenStates"] == 0.0
    assert all(log["kl"] > 1e-7 and log["loss/HiddenStates"] > 1e-6 for log in later)


@pytest.mark.parametrize("kind", FOLLOWING)
@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_is_bit_exact(results: Results, engine: str, kind: str) -> None:
    straight, resumed = (results(engine)[f"{kind} {how}"] for how in ("straight", "resumed"))
    assert deviation(straight["weights"], resumed["weights"]) == 0.0
    assert straight["logs"] == resumed["logs"]
    whole = results("one")[f"{kind} straight"]["weights"]
    assert deviation(straight["weights"], whole) <= BOUND


@pytest.mark.parametrize("kind", FOLLOWING)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_teacher_is_in_the_checkpoint_alone(
    results: Results, folder: Path, engine: str, kind: str
) -> None:
    files = results(engine)[f"{kind} files"]
    whole = {"pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"}
    assert ("teacher.safetensors" in files) != bool(whole & set(files))
    final = folder / engine / kind / "final"
    assert not any("teacher" in path.name for path in final.iterdir())
    if kind == "ema":
        AutoModelForCausalLM.from_pretrained(final)
    for path in final.glob("*.safetensors"):
        assert not any("within" in name for name in load_file(path))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2_sharded"])
def test_it_is_sharded_as_the_student(results: Results, engine: str, kind: str) -> None:
    groups = results(engine)[f"{kind} groups"]
    inside = "base_model.model.model" if kind in ADAPTED else "model"
    expected = [f"student.{inside}.layers.{k}" for k in range(2)]
    if kind != "adapter_off":
        expected += [f"within.model.{inside}.layers.{k}" for k in range(2)]
    assert groups == ["<root>", *expected]
    assert results(engine)[f"{kind} sharded"]
    assert results(engine)["wrapped"] == "FSDPDistiller"
    assert results("ddp")["wrapped"] == "DistributedDataParallel"


def test_exits_learn_and_say_what_they_are(results: Results) -> None:
    """The KL of an exit, its own cross-entropy, and no KL of the student to itself."""
    logs = results("one")[f"{DEEP} 8"]["logs"]
    names = {"loss", *(f"loss/{n}" for n in ("CrossEntropy", "CrossEntropy.2", "Logits"))}
    assert set(logs[0]) == {*names, "loss/HiddenStates"}
    assert all(log["loss/Logits"] > 0 for log in logs)


def test_training_moved_student_and_mean(results: Results) -> None:
    """The bounds would mean nothing for weights that stay."""
    for kind in FOLLOWING:
        found = results("one")[f"{kind} 8"]["weights"]
        trained = [n for n in found if n.startswith("student.") and "lora_A" not in n]
        far = [
            float((found[n] - found[n.replace("student.", "within.model.")]).abs().max())
            for n in trained
            if kind == "ema" or "lora_B" in n
        ]
        assert min(far) > 1e-8
