"""Which adapters leave their base model what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from transformers import PreTrainedModel

from llm_distill import AdapterOff, CrossEntropy, DistillTrainer, Local, Logits
from llm_distill.errors import InputError
from llm_distill.signals import Request
from llm_distill.teachers.adapters import refuse_moving, refuse_unfrozen, told
from tests import on_disk, tiny
from tests.teachers.test_local import batch

Q = ["q_proj", "v_proj"]


def lora(**changes: Any) -> LoraConfig:
    given: dict[str, Any] = {"r": 4, "target_modules": Q, **changes}
    return LoraConfig(**given)


def adapted(config: Any, student: PreTrainedModel | None = None) -> PeftModel:
    made = get_peft_model(student or tiny.llama("student"), config)
    assert isinstance(made, PeftModel)
    return made


def trainer(folder: Path, student: Any, config: Any = None, **given: Any) -> DistillTrainer:
    args = tiny.arguments(folder, learning_rate=0.3)
    objectives = [CrossEntropy(), Logits(weight=0.01)]
    data = {"train_dataset": tiny.rows(), **given}
    return DistillTrainer(student, AdapterOff(), objectives, args, peft_config=config, **data)


MOVING = [
    (lora(bias="all"), "bias: all trains biases of the base model, which is the teacher and would"),
    (lora(bias="lora_only"), "bias: lora_only trains"),
    (lora(init_lora_weights="pissa"), "init_lora_weights: pissa rewrites the weights of the base"),
    (lora(init_lora_weights="pissa_niter_4"), "init_lora_weights: pissa_niter_4 rewrites"),
    (lora(init_lora_weights="olora"), "init_lora_weights: olora rewrites"),
]

STAYING: dict[str, Any] = {
    "lora": lora(),
    "false": lora(init_lora_weights=False),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "dora": lora(use_dora=True),
    "head": lora(modules_to_save=["lm_head"]),
    "norm": lora(modules_to_save=["norm"]),
    "tokens": lora(trainable_token_indices=[5, 6, 7]),
    "ia3": IA3Config(target_modules=Q, feedforward_modules=[]),
    "vblora": VBLoRAConfig(target_modules=Q, r=2, num_vectors=8, vector_length=16, topk=2),
}


@pytest.mark.parametrize(("config", "message"), MOVING)
def test_what_moves_or_rewrites_the_base(tmp_path: Path, config: Any, message: str) -> None:
    """Before weights load, whether the student gets them or has them."""
    with pytest.raises(InputError, match=rf"AdapterOff\(LlamaFor.*: {message}.*BornAgain"):
        trainer(tmp_path, tiny.llama("student"), config)


def test_before_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = str(on_disk.save_model(tmp_path / "student", "student"))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(InputError, match="init_lora_weights: pissa rewrites"):
        trainer(
            tmp_path / "out",
            student,
            lora(init_lora_weights="pissa"),
            processing_class=tiny.tokenizer(),
        )


def test_a_student_that_has_such_adapters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="init_lora_weights: pissa rewrites"):
        trainer(tmp_path, adapted(lora(init_lora_weights="pissa")))
    with pytest.raises(InputError, match="bias: all trains"):
        trainer(tmp_path, adapted(lora(bias="all")))


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "something_new"])
def test_what_cannot_be_made_here(start: str) -> None:
    config = lora()
    config.init_lora_weights = start  # type: ignore[assignment]
    with pytest.raises(InputError, match=f"T: init_lora_weights: {start} rewrites"):
        refuse_moving(config, "T")
    config = lora()
    config.kasa_config = object()  # type: ignore[assignment]
    with pytest.raises(InputError, match="T: kasa_config cuts the weights"):
        refuse_moving(config, "T")


@pytest.mark.parametrize("name", list(STAYING))
def test_the_base_stays_the_teacher(tmp_path: Path, name: str) -> None:
    """After steps of cross-entropy at a high rate, which move all that may move."""
    made = trainer(tmp_path, tiny.llama("student"), STAYING[name])
    made.train()
    within: Any = made.distiller.within
    request, cpu = Request(logits=True), torch.device("cpu")
    found = within(batch()).whole.logits(slice(None))
    base = Local(tiny.llama("student")).open(request, cpu)(batch()).whole.logits(slice(None))
    assert torch.equal(found, base)
    student: Any = made.student
    refuse_unfrozen(student, "T")
    own = student(**batch().inputs).logits.flatten(0, 1)[batch().supervised.index]
    assert (own - base).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.mlp.up_proj", "layers.0.self_attn.q"])
def test_a_base_that_is_not_frozen(tmp_path: Path, part: str) -> None:
    """Under an adapter or beside it."""
    student = adapted(lora())
    for path, parameter in student.named_parameters():
        if part in path and "lora" not in path:
            parameter.requires_grad = True
    with pytest.raises(InputError, match=rf"the student trains [\w.]*{part}[\w.]* of its base"):
        trainer(tmp_path, student)


def test_a_module_that_is_trained_as_a_copy_and_as_itself() -> None:
    student = adapted(lora(modules_to_save=["lm_head"]))
    refuse_unfrozen(student, "T")
    base: Any = student.get_base_model()
    base.lm_head.original_module.weight.requires_grad = True
    base.model.norm.weight.requires_grad = True
    with pytest.raises(InputError, match=r"norm\.weight and 1 more of its base model"):
        refuse_unfrozen(student, "T")


def test_adapters_that_start_at_random_are_told(tmp_path: Path) -> None:
    assert told(lora(), "T") == ()
    made = trainer(tmp_path, tiny.llama("student"), lora(init_lora_weights=False))
    line = "init_lora_weights: false lets the adapters start at random, so the student begins as"
    assert any(line in said for said in made.run.told)
    made = trainer(tmp_path, tiny.llama("student"), lora())
    assert not any("at random" in said for said in made.run.told)
