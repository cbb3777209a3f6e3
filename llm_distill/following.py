"""Teachers that follow the student: they hear of every optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_distill.teachers.within import settled

if TYPE_CHECKING:
    from llm_distill.distiller import Distiller


class Follow(TrainerCallback):
    """Tells the teacher within that an optimizer step is done, before anything is saved.

    Args:
        distiller: With the student and the teacher.
    """

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As Trainer calls it."""
        del args, state, control, kwargs
        settled(self._distiller)
        if self._distiller.within is not None:
            self._distiller.within.after_step(self._distiller.student)
