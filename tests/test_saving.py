"""Files of a student and of what the terms learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llm_distill import CrossEntropy, HiddenStates
from llm_distill.balance import gradient, normalised, uncertainty
from llm_distill.balance.base import settle
from llm_distill.binding import bind
from llm_distill.distiller import Distiller
from llm_distill.layers import first, last, uniform
from llm_distill.saving import (
    ADAPTER_FILE,
    TERMS_FILE,
    load_maps,
    load_student,
    load_terms,
    save_maps,
    save_student,
    save_terms,
)
from llm_distill.signals import ModelSpec
from tests import tiny


def distiller(
    student: Any = None, wanted: Any = None, seed: int = 0, balance: Any = None
) -> Distiller:
    spec = ModelSpec.of(tiny.llama("student").config, "student")
    teacher = ModelSpec.of(tiny.llama("teacher").config, "teacher")
    terms = bind(wanted or [HiddenStates()], spec, teacher, seed=seed)
    student = student if student is not None else tiny.llama("student")
    return Distiller(student, terms, "student", balance=settle(balance, terms, spec.depth))


def cast_to(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return model.to(dtype)


def test_terms_come_back(tmp_path: Path) -> None:
    first, second = distiller(seed=1), distiller(seed=2)
    save_terms(first, tmp_path, None)
    load_terms(second, tmp_path)
    ours, theirs = first.terms.state_dict(), second.terms.state_dict()
    assert ours
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_gathered_state_is_split(tmp_path: Path) -> None:
    """As FSDP gives it: one dict with prefixes."""
    whole = {k: v + 1 for k, v in distiller().state_dict().items()}
    target = distiller()
    save_student(target, tmp_path, whole)
    save_terms(target, tmp_path, whole)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(v, whole[f"student.{k}"]) for k, v in written.items())
    terms = load_file(tmp_path / TERMS_FILE)
    assert all(torch.equal(v, whole[f"terms.{k}"]) for k, v in terms.items())


@pytest.mark.parametrize("rule", [normalised, uncertainty, gradient])
@pytest.mark.parametrize("wanted", [[HiddenStates()], [CrossEntropy()]])
@pytest.mark.parametrize("gathered", [False, True])
def test_a_balance_comes_back(tmp_path: Path, rule: Any, wanted: Any, gathered: bool) -> None:
    """Beside the terms, or alone; as it is, or as FSDP gathers it."""
    first, second = (distiller(wanted=wanted, balance=rule) for _ in range(2))
    for value in first.balance.state_dict().values():
        value.add_(0.5)
    state = first.state_dict() if gathered else None
    save_student(first, tmp_path, state)
    save_terms(first, tmp_path, state)
    load_terms(second, tmp_path)
    ours, theirs = first.balance.state_dict(), second.balance.state_dict()
    assert ours
    assert all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in ours)
    assert not any("balance" in name for name in load_file(tmp_path / "model.safetensors"))


def test_another_balance_is_refused(tmp_path: Path) -> None:
    save_terms(distiller(balance=uncertainty), tmp_path, None)
    message = r"of another balance between terms: it has \['balance.s'\], this run none; write the"
    with pytest.raises(ValueError, match=message):
        load_terms(distiller(), tmp_path)
    with pytest.raises(ValueError, match=r"this run \['balance.first', 'balance.running"):
        load_terms(distiller(balance=normalised), tmp_path)


def test_terms_without_weights_need_no_file(tmp_path: Path) -> None:
    nothing = distiller(wanted=[CrossEntropy()])
    save_terms(nothing, tmp_path, None)
    assert not list(tmp_path.iterdir())
    load_terms(nothing, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_student_comes_back(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    saved = distiller(cast_to(tiny.llama("student", tied=tied), dtype))
    with torch.no_grad():
        for parameter in saved.student.parameters():
            parameter.add_(0.5)
    save_student(saved, tmp_path, None)
    other = distiller(cast_to(tiny.llama("student", tied=tied), dtype))
    load_student(other, tmp_path)
    ours, theirs = saved.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert next(other.student.parameters()).dtype == dtype


def test_another_student_is_refused(tmp_path: Path) -> None:
    save_student(distiller(), tmp_path, None)
    spec = ModelSpec.of(tiny.llama("teacher").config, "large")
    large = Distiller(tiny.llama("teacher"), bind([CrossEntropy()], spec, spec, seed=0), "large")
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        load_student(large, tmp_path)


def test_adapter_files_are_complete_or_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = distiller(get_peft_model(tiny.llama("student"), config))
    with pytest.raises(FileNotFoundError, match="no checkpoint of an adapter"):
        load_student(adapted, tmp_path)
    save_student(adapted, tmp_path, None)
    load_student(adapted, tmp_path)
    weights = load_file(tmp_path / ADAPTER_FILE)
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match="does not fit the adapter: missing"):
        load_student(adapted, tmp_path)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_active_adapter_comes_back_whatever_its_name(tmp_path: Path, name: str) -> None:
    """In the folder itself, as PEFT looks for it; adapters beside it are not the student's."""
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    saved = get_peft_model(tiny.llama("student"), config, adapter_name=name)
    saved.add_adapter("beside", LoraConfig(target_modules=["v_proj"]))
    save_student(distiller(saved), tmp_path, None)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    plain = PeftModel.from_pretrained(tiny.llama("student"), str(tmp_path))
    other = get_peft_model(tiny.llama("student"), config, adapter_name=name)
    other.add_adapter("beside", LoraConfig(target_modules=["v_proj"]))
    load_student(distiller(other), tmp_path)
    ids = tiny.batch()["input_ids"]
    expected = saved(ids).logits
    assert torch.equal(other(ids).logits, expected)
    assert torch.allclose(plain.eval()(ids).logits, expected, atol=1e-5)


def test_parts_wider_than_the_rest_come_back_unrounded(tmp_path: Path) -> None:
    def mixed() -> Any:
        student = cast_to(tiny.llama("student"), torch.bfloat16)
        cast_to(student.get_submodule("lm_head"), torch.float32)
        return student

    spec = ModelSpec.of(tiny.llama("student").config, "student")
    # Its own forward does not mix dtypes; the head is not read here.
    terms = bind([HiddenStates()], spec, spec, seed=0)
    saved, other = (Distiller(mixed(), terms, "student") for _ in range(2))
    with torch.no_grad():
        saved.student.get_parameter("lm_head.weight").add_(1e-3)
    save_student(saved, tmp_path, None)
    load_student(other, tmp_path)
    ours, theirs = saved.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_projectors_of_another_map_are_refused(tmp_path: Path) -> None:
    """They would fit by their shapes, and belong to other layers."""

    def made(layers: Any) -> Distiller:
        student, teacher = tiny.llama("student"), tiny.llama("teacher")
        specs = ModelSpec.of(student.config, "student"), ModelSpec.of(teacher.config, "teacher")
        terms = {"HiddenStates": HiddenStates(layers=layers).build(*specs)}
        return Distiller(student, terms, "student")

    save_terms(made(uniform), tmp_path, None)
    load_terms(made(uniform), tmp_path)
    with pytest.raises(ValueError, match=r"other layer maps, 1->2 2->4; this run has 1->1 2->2;"):
        load_terms(made(first), tmp_path)


def test_maps_are_compared_where_the_terms_lie_elsewhere(tmp_path: Path) -> None:
    """Under sharding; older checkpoints without maps are taken."""
    spec = ModelSpec.of(tiny.llama("teacher").config, "teacher")

    def made(layers: Any) -> Distiller:
        terms = {"HiddenStates": HiddenStates(layers=layers).build(spec, spec)}
        return Distiller(tiny.llama("teacher"), terms, "student")

    folder = tmp_path / "checkpoint-2"
    load_maps(made(uniform), folder)
    save_maps(made(uniform), folder)
    load_maps(made(uniform), folder)
    with pytest.raises(ValueError, match=r"with other layer maps, .* or start over"):
        load_maps(made(last), folder)
