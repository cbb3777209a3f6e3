"""The trainings of a race: one arm at a time, on a copy of the student."""

from __future__ import annotations

import copy
import gc
import logging
import math
import random
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PrinterCallback, set_seed
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llm_distill.arguments import sharded_by
from llm_distill.errors import InputError
from llm_distill.race.candidates import with_arm
from llm_distill.race.examples import collator_copy, held_out, total_steps
from llm_distill.teachers import Source, Teacher
from llm_distill.teachers.forms import form_of
from llm_distill.teachers.members import Composite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import TrainingArguments

    from llm_distill.preparation import Run
    from llm_distill.race.halving import Arm
    from llm_distill.signals import ModelSpec, Request

OWN = (dict, list, set, AcceleratorConfig)
"""Values of arguments that a training may write into."""


@dataclass(frozen=True)
class Opened(Composite):
    """A teacher that is at work already, for another trainer.

    Composite, so that what is asked of its members (columns of the data) is asked of it too.
    """

    teacher: Teacher
    source: Source

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The one it is."""
        return (self.teacher,)

    @property
    def model(self) -> Any:  # noqa: ANN401  a loaded model or its name; not every kind has one
        """As its spec has it: the class of a loaded one tells whether it is causal."""
        return getattr(self.teacher, "model", None)

    @property
    def config(self) -> Any:  # noqa: ANN401  as Teacher has it
        """Of its model."""
        return self.teacher.config

    @property
    def spec(self) -> ModelSpec:
        """Of its model."""
        return self.teacher.spec

    def of(self, teachers: Sequence[Teacher]) -> Opened:
        """The same: it is at work, and knows all that it has to."""
        del teachers
        return self

    def check_together(self, request: Request) -> None:
        """Nothing to refuse: it is at work."""
        del request

    def form(self) -> str | None:
        """As the teacher."""
        return form_of(self.teacher)

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  as Teacher has it
        """Of its model."""
        return self.teacher.find_tokenizer()

    def check(self, request: Request, device: torch.device) -> None:
        """Nothing to refuse: it is at work."""
        del request, device

    def open(self, request: Request, device: torch.device) -> Source:
        """The same source, asked for something else."""
        del device
        self.source.ask(request)
        return self.source


class Heats:
    """Trains one arm at a time, all on the same examples in the same order.

    Args:
        run: Whose student, teacher and data they are.
        student: Copied for every training.
        source: The teacher.
        args: Of the run.
        make: `DistillTrainer`.

    Raises:
        InputError: If there is nothing to hold out.
    """

    def __init__(
        self,
        run: Run,
        student: nn.Module,
        source: Source,
        args: TrainingArguments,
        make: Callable[..., Any],
    ) -> None:
        self._run, self._student, self._args, self._make = run, student, args, make
        self._teacher = Opened(run.teacher, source)
        self._train, self._held_out = held_out(run.kwargs.get("train_dataset"))
        self._total = total_steps(run, args)
        self.shows = not args.disable_tqdm and args.process_index == 0

    def measure(self, arm: Arm, steps: int) -> float:
        """Held-out KL after a training of some steps, rank 0's; NaN for one that failed."""
        with tempfile.TemporaryDirectory() as folder, _quiet(), same_random_numbers():
            try:
                kl = self._measure(arm, arguments(self._args, steps, self._total, folder))
            finally:
                gc.collect()  # trainers are circles; the next copy has to find room
        told = torch.tensor(kl, dtype=torch.float32, device=self._args.device)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(told, src=0)
        return float(told)

    def _measure(self, arm: Arm, args: TrainingArguments) -> float:
        """The same; what it needs is let go when it returns."""
        given = self._run.kwargs
        trainer = self._make(
            copy.deepcopy(self._student),
            self._teacher,
            with_arm(self._run.objectives, arm),
            args,
            train_dataset=self._train,
            eval_dataset=self._held_out,
            data_collator=collator_copy(given["data_collator"]),
            processing_class=given.get("processing_class"),
            optimizer_cls_and_kwargs=given.get("optimizer_cls_and_kwargs"),
        )
        trainer.announces = False
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
            set_seed(args.seed)  # collators may draw: the same in every arm
            return float(trainer.evaluate()["eval_kl"])
        except FloatingPointError:
            return math.nan
        finally:
            trainer.model_wrapped = trainer.model
            trainer.accelerator.free_memory()


def refuse(run: Run, args: TrainingArguments) -> None:
    """Refuse what a copy of the student cannot be trained with.

    Raises:
        InputError: For a sharded student, or an optimizer that was made for the student itself.
    """
    sharded = sharded_by(args)
    if sharded is not None:
        raise InputError(
            f"auto_race trains copies of the student, which {sharded} would shard; race in one "
            "process first: llm-distill map recipe.yaml, and write layers: {saved: {path: …}}"
        )
    if any(given is not None for given in run.kwargs.get("optimizers") or ()):
        raise InputError(
            "auto_race trains copies of the student, whose weights these optimizers do not know; "
            "give optimizer_cls_and_kwargs=(AdamW, {'lr': 1e-4}) instead"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: whatever they say was said of the run itself."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Random numbers afterwards as if nothing had been drawn."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  what Trainer seeds
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002  as above


def arguments(args: TrainingArguments, steps: int, total: int, folder: str) -> TrainingArguments:
    """The same arguments for a short training that leaves nothing behind.

    What is written in steps of the training is as large a share of the short one.

    Args:
        args: Of the run.
        steps: Of the short training.
        total: Of the run.
        folder: Instead of the run's.
    """
    short = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, OWN):
            setattr(short, name, copy.deepcopy(value))
    short.output_dir, short.max_steps = folder, steps
    short.save_strategy, short.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    short.logging_strategy = IntervalStrategy.NO
    short.report_to, short.push_to_hub = [], False
    short.load_best_model_at_end, short.disable_tqdm = False, True
    short.eval_on_start = short.torch_compile = short.enable_jit_checkpoint = False
    if short.warmup_steps >= 1:  # else it is a share already
        share = short.warmup_steps / total
        short.warmup_steps = share if share < 1 else steps
    if isinstance(short.lr_scheduler_kwargs, dict):
        short.lr_scheduler_kwargs = {
            key: round(value * steps / total) if key.endswith("_steps") else value
            for key, value in short.lr_scheduler_kwargs.items()
        }
    return short
