"""Students of every kind: what is known of them before their weights load, and loading them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from llm_distill.capture import plain, predicts_next
from llm_distill.errors import InputError
from llm_distill.kinds import is_masked
from llm_distill.provenance import Provenance
from llm_distill.signals import ModelSpec
from llm_distill.students.blocks import matching
from llm_distill.students.from_config import FromConfig
from llm_distill.students.from_teacher import FromTeacher
from llm_distill.teachers.itself import Itself
from llm_distill.teachers.local import Local
from llm_distill.teachers.members import leaves

if TYPE_CHECKING:
    from peft import PeftConfig

    from llm_distill.teachers.base import Teacher

Made = FromConfig | FromTeacher
"""Students that are made for a teacher, with its tokenizer and of its kind."""

Student = str | PreTrainedModel | Local | Made
"""A Hub id or path, a loaded model, a spec of one, or one that is made for a teacher."""


def student_spec(student: Student, teacher: PreTrainedConfig) -> ModelSpec:
    """What is known of a student before its weights load.

    Where its blocks come from is kept if the teacher has as many as the one they were cut from.

    Raises:
        InputError: If the student cannot be made for this teacher.
    """
    if isinstance(student, FromConfig):
        config, name = student.resolve(teacher), f"FromConfig({student.architecture})"
        return replace(ModelSpec.of(config, name), fresh=True)
    if isinstance(student, FromTeacher):
        return ModelSpec.of(_checked(student, teacher), str(student))
    spec = as_local(student)
    if spec.shard not in ("auto", "replica"):
        raise InputError(
            f"student {spec.name}: shard={spec.shard!r} is for teachers; a student is sharded by "
            "the launch (recipes/accelerate/fsdp2.yaml): leave shard out"
        )
    if spec.quantize is not None:
        raise InputError(
            f"student {spec.name}: quantize={spec.quantize!r} is for teachers; a student is "
            "trained in all of its bits: leave quantize out"
        )
    found = Provenance.read(spec.config)
    whole = teacher.get_text_config(decoder=True).num_hidden_layers
    fits = found is not None and found.of == whole
    return spec.spec if fits else replace(spec.spec, blocks=None)


def teacher_for(student: Student, teacher: Teacher, adapter: PeftConfig | None = None) -> Teacher:
    """The teacher, of this student where it is the student itself.

    Args:
        student: As it was given.
        teacher: As it was given.
        adapter: What the student gets.

    Raises:
        InputError: For a student that is made for a teacher, one that this cannot be made of, or
            that is the teacher's very object.
    """
    if isinstance(student, FromTeacher) and not isinstance(teacher, Itself):
        student.check_teacher(teacher)
    if not isinstance(teacher, Itself):
        loaded = _weights(student)
        if loaded is not None and any(loaded is _weights(leaf) for leaf in leaves(teacher)):
            raise InputError("model and teacher are one object; give the teacher a copy of its own")
        return teacher
    if isinstance(student, Made):
        raise InputError(
            f"{type(teacher).__name__} is made of the student, and {type(student).__name__} makes "
            "a student for its teacher; write a Hub id, a path or a loaded model as the student"
        )
    own = as_local(student)
    made = teacher.of(own)
    made.check_student(adapter)
    return made


def _weights(model: object) -> nn.Module | None:
    """The loaded model behind a student or a teacher, adapters taken off."""
    inner = model.model if isinstance(model, Local) else model
    return plain(inner) if isinstance(inner, nn.Module) else None


def both_causal(model: Student, teacher: Teacher) -> bool:
    """Whether both models are causal.

    Raises:
        InputError: If one is and the other is not.
    """
    theirs, *others = map(_causal, leaves(teacher))
    if any(other != theirs for other in others):
        raise InputError(
            f"{teacher.spec.name}: causal and masked language models among the members; take "
            "members of one kind"
        )
    ours = theirs if isinstance(model, Made) else _causal(as_local(model))
    if ours != theirs:
        kinds = ["causal" if causal else "masked" for causal in (ours, theirs)]
        raise InputError(
            f"the student is a {kinds[0]} language model and the teacher a {kinds[1]} one; take "
            "two of one kind"
        )
    return ours


def _causal(spec: Teacher) -> bool:
    """Whether a model is a causal one, by its class or by what its config was saved from."""
    loaded = getattr(spec, "model", None)
    return predicts_next(loaded) if isinstance(loaded, nn.Module) else not is_masked(spec.config)


def load_student(student: Student, teacher: Teacher) -> PreTrainedModel:
    """The model to train; ids and paths get fp32 master weights unless the spec says otherwise."""
    if isinstance(student, FromConfig):
        return student.load(teacher.config)
    if isinstance(student, FromTeacher):
        return student.load(teacher)
    return as_local(student).load(default_dtype="float32")


def refuse_adapted_head(
    student: Student, teacher: PreTrainedConfig, adapter: PeftConfig | None
) -> None:
    """Refuse an adapter on the language-model head, before weights load.

    Raises:
        InputError: Naming the head, and what to write instead.
    """
    if adapter is None or adapter.is_prompt_learning:
        return
    head = head_name(student, teacher)
    if head is not None and _adapts(adapter, head):
        raise InputError(
            f"the adapter would sit on {head}, the student's language-model head, and losses on "
            f"logits read that as one matrix; take {head.rpartition('.')[2]} out of "
            "target_modules, or write modules_to_save: "
            f"[{head.rpartition('.')[2]}], which trains it whole"
        )


def head_name(student: Student, teacher: PreTrainedConfig) -> str | None:
    """What the student's language-model head is called inside it, from the config alone.

    Returns:
        The name; None where nobody knows it before the weights load.
    """
    model = None if isinstance(student, Made) else as_local(student).model
    if model is None or isinstance(model, str):
        model = _without_weights(student, teacher)
    head = None if model is None else plain(model).get_output_embeddings()
    named = () if model is None else plain(model).named_modules()
    return next((name for name, module in named if module is head), None)


def _without_weights(student: Student, teacher: PreTrainedConfig) -> PreTrainedModel | None:
    """The student on a device that holds nothing; None for a class that is not transformers'."""
    spec = student if isinstance(student, Made) else as_local(student)
    config = spec.config if isinstance(spec, Local) else spec.resolve(teacher)
    kind: Any = _class_of(config)
    if kind is None:
        return None
    with torch.device("meta"):
        return cast("PreTrainedModel", kind(config))


def _checked(student: FromTeacher, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a cut student, its blocks compared with the teacher's where that can be now."""
    made = student.resolve(teacher)
    found, kind = Provenance.read(made), _class_of(teacher)
    if kind is not None and found is not None:
        matching(kind, teacher, made, found.blocks)
    return made


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that belongs to a config; None for one from elsewhere."""
    masked = is_masked(config)
    mapping: Any = MODEL_FOR_MASKED_LM_MAPPING if masked else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        return None
    return cast("type[PreTrainedModel]", mapping[type(config)])


def _adapts(adapter: PeftConfig, head: str) -> bool:
    """Whether PEFT would put an adapter on a module."""
    given = vars(adapter)
    parameters = given.get("target_parameters") or ()
    if any(f".{head}.weight".endswith(f".{name}") for name in parameters):
        return True
    return bool(given.get("target_modules") and check_target_module_exists(adapter, head))


def as_local(model: str | PreTrainedModel | Local) -> Local:
    """A name or a loaded model as a spec."""
    return model if isinstance(model, Local) else Local(model)
