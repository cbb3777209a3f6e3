"""The student as its own teacher: a copy of it, a slow one, or itself without its adapters."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel

from llm_distill.errors import InputError
from llm_distill.teachers.adapters import refuse_moving, refuse_unfrozen, told
from llm_distill.teachers.local import Local
from llm_distill.teachers.within import Copy, Deeper, Shared, Within, refuse_attention

if TYPE_CHECKING:
    from typing import Self

    import torch
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from llm_distill.signals import ModelSpec, Request


@dataclass(frozen=True)
class Itself(ABC):
    """A teacher that is made of the student; it has no model of its own to name.

    It speaks inside the wrapped forward, so that it is sharded, and computes, as the student does.

    Attributes:
        student: What it is made of, once that is known (`of`).
    """

    student: Local | None = field(default=None, init=False, compare=False)

    def of(self, student: Local) -> Self:
        """The same, of this student."""
        made = copy.copy(self)
        object.__setattr__(made, "student", student)
        return made

    @property
    def _own(self) -> Local:
        """The student.

        Raises:
            InputError: Before anybody said which.
        """
        if self.student is None:
            raise InputError(
                f"{type(self).__name__} is the student itself, and stands alone: write teacher: "
                f"{type(self).__name__}, not a member of several"
            )
        return self.student

    @property
    def model(self) -> str | PreTrainedModel:
        """The student's."""
        return self._own.model

    @property
    def config(self) -> PreTrainedConfig:
        """The student's."""
        return self._own.config

    @property
    def spec(self) -> ModelSpec:
        """The student's, under a name of its own."""
        return replace(self._own.spec, name=f"{type(self).__name__}({self._own.name})")

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """The student's."""
        return self._own.find_tokenizer()

    def check_student(self, adapter: PeftConfig | None) -> None:
        """Refuse a student that this teacher cannot be made of; most can.

        Args:
            adapter: What it gets; it may have others already.
        """
        del adapter

    def check(self, request: Request, device: torch.device) -> None:
        """Nothing to refuse: what it reads is the student's, which is checked as such."""
        del request, device

    def open(self, request: Request, device: torch.device) -> Within:
        """Make it of the student as it is now, and where that is: a wrapper shards it from there.

        Raises:
            ValueError: If it cannot give a signal.
        """
        del device
        loaded = not isinstance(self.model, str)
        model = cast("nn.Module", self._own.load(default_dtype="float32"))
        return self._made(model, request, shared=loaded)

    @abstractmethod
    def _made(self, model: nn.Module, request: Request, *, shared: bool) -> Within:
        """The source.

        Args:
            model: The student.
            request: What is read from it.
            shared: Whether it is the one that is trained, and not loaded for this alone.
        """


@dataclass(frozen=True)
class BornAgain(Itself):
    """A frozen copy of the student as it was when the training began.

    Source: Furlanello et al. 2018 (Born-Again Networks), arXiv 1805.04770.
    """

    def _made(self, model: nn.Module, request: Request, *, shared: bool) -> Within:
        """A copy."""
        return Copy(copy.deepcopy(model) if shared else model, request, self.spec.name)


@dataclass(frozen=True)
class Ema(Itself):
    """A copy of the student that follows it slowly: the mean of its weights, newer ones first.

    Formula: after each optimizer step, `mean = decay * mean + (1 - decay) * student`, on the
    weights that are trained; the mean starts as the student. It is saved and resumed with a
    checkpoint, and never exported. A student with adapters is copied whole, its base too.

    Attributes:
        decay: Share of the mean that stays, in [0, 1); its memory is about 1 / (1 - decay) steps.

    Raises:
        InputError: For a decay outside of [0, 1).

    Source: Tarvainen, Valpola 2017 (Mean teachers), arXiv 1703.01780.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        """Refuse a mean that would never move, or leave."""
        if not (math.isfinite(self.decay) and 0 <= self.decay < 1):
            raise InputError(
                f"Ema: decay is {self.decay}; write a number from 0 up to 1, such as 0.999 (a "
                "teacher that never moves is BornAgain)"
            )

    def _made(self, model: nn.Module, request: Request, *, shared: bool) -> Within:
        """A copy that follows.

        Raises:
            InputError: For weights in halves, which would not hear of a thousandth.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in trained):
            raise InputError(
                f"{self.spec.name}: the student is trained in {trained[0].dtype}, which cannot "
                "hold a mean that moves slowly; load it in float32 and write training: "
                "{bf16: true}"
            )
        own = copy.deepcopy(model) if shared else model
        return Copy(own, request, self.spec.name, decay=self.decay)


@dataclass(frozen=True)
class AdapterOff(Itself):
    """The student without its adapters: the base model as the teacher, without further weights.

    It gives logits and hidden states; attention would be read from modules that are in use. What
    moves or rewrites the base (`bias`, initialisations such as `pissa`, weights that are not
    frozen) is refused.
    """

    def check_student(self, adapter: PeftConfig | None) -> None:
        """Refuse a student without adapters, or whose base model would not stay what it is.

        Raises:
            InputError: Saying what to write.
        """
        name, student = self.spec.name, self._own.model
        there = student if isinstance(student, PeftModel) else None
        configs = [] if there is None else list(there.peft_config.values())
        configs += [] if adapter is None else [adapter]
        if not configs:
            raise InputError(
                f"{name}: the student has no adapters to leave out; give peft_config (in "
                "a recipe, peft: {r: 16}), a PeftModel as the student, or another teacher"
            )
        for config in configs:
            refuse_moving(config, name)
        if there is not None:
            refuse_unfrozen(there, name)

    def check(self, request: Request, device: torch.device) -> None:
        """Refuse attention.

        Raises:
            InputError: Saying what to use.
        """
        del device
        _refuse_attention(request, self.spec.name)

    def _made(self, model: nn.Module, request: Request, *, shared: bool) -> Within:
        """The student; what was loaded for this alone has no adapters."""
        del shared
        name, bare = self.spec.name, isinstance(model, PeftModel)
        made = Shared(cast("PreTrainedModel", model), request, name, bare=bare)
        if isinstance(model, PeftModel):
            made.told = told(model.active_peft_config, name)
        return made


@dataclass(frozen=True)
class DeepToShallow(Itself):
    """The student's own deeper layers as the teacher of its shallower ones, in one forward.

    `Logits(exit=2)` teaches the exit of layer 2 what the last layer says, and `HiddenStates` with a
    map to deeper layers, such as `{explicit: {pairs: [[2, 6]]}}`, the state of layer 2 that of
    layer 6. What teaches has no gradient; `CrossEntropy` trains it as ever.

    Source: Zhang et al. 2019 (Be Your Own Teacher), arXiv 1905.08094.
    """

    def check_student(self, adapter: PeftConfig | None) -> None:
        """Refuse a student that has no layer below another.

        Raises:
            InputError: Saying what to write.
        """
        del adapter
        if self.spec.depth < 2:
            raise InputError(
                f"{self.spec.name}: the student has one block, and none below it to teach; take a "
                "deeper one, or another teacher"
            )

    def check(self, request: Request, device: torch.device) -> None:
        """Refuse attention.

        Raises:
            InputError: Saying what to use.
        """
        del device
        _refuse_attention(request, self.spec.name)

    def _made(self, model: nn.Module, request: Request, *, shared: bool) -> Within:
        """The student."""
        del shared
        return Deeper(cast("PreTrainedModel", model), request, self.spec.name, bare=False)


def _refuse_attention(request: Request, name: str) -> None:
    """Before weights load, what their source refuses.

    Raises:
        InputError: Naming the blocks.
    """
    try:
        refuse_attention(request, name)
    except ValueError as error:
        raise InputError(str(error)) from error
