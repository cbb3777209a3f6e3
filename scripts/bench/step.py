"""`step`: teacher forward, student forward and backward, without the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill import CrossEntropy, Logits
from llm_distill.losses.sparse import TopK, coarsen
from scripts.bench import dense, floors, ours, step_rivals
from scripts.bench.arms import Answer, Arm, Benchmark
from scripts.bench.inputs import CE_WEIGHT, Loss
from scripts.bench.models import Models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scripts.bench.measure import Run
    from scripts.bench.settings import StepSettings

TEACHER, TEACHER_BODY = "teacher forward with head", "teacher body"
STUDENT_BODY = "student body, fwd + bwd"
SFT, SFT_DENSE = "SFT, our head pass", "SFT, dense"
GEMMS = "4 head GEMMs"
CE, DIVERGENCE, MIXED, TOP = "CE", "divergence", "divergence + CE", "divergence of top tokens"
KEPT = 64
"""Tokens of each row in the arm of a cached teacher."""


class StepBenchmark(Benchmark):
    """Models and arms.

    Args:
        settings: What was asked for.
    """

    # R is a teacher's forward with its head and a student's step on labels alone.
    ratios: Mapping[str, tuple[str, ...]] = {
        "x R": (TEACHER, SFT),
        "x floor": (TEACHER_BODY, STUDENT_BODY, GEMMS),
    }
    lean = SFT

    def __init__(self, settings: StepSettings) -> None:
        self.settings: StepSettings = settings
        self.loss = Loss.parse(settings.loss)
        self.models = Models.build(settings)
        s = settings
        self.title = (
            f"step: {s.loss}, student {s.student_layers} x {s.student_width}, "
            f"teacher {s.teacher_layers} x {s.teacher_width}, V={s.vocab:,}, "
            f"{s.batch} x {s.length} tokens, {int(self.models.supervised.sum()):,} of them "
            f"supervised, {s.dtype}, chunk {s.chunk}"
        )

    def arms(self) -> list[Arm]:
        """Parts, ours, the dense way, rivals."""
        rivals = step_rivals.step_arms(self.models, self.loss)
        return [*self._parts(), *self._ours(), self._dense(), *rivals]

    def forget(self) -> None:
        """Drop all gradients."""
        self.models.student.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Of the head, and of all that is below it."""
        parameters = dict(self.models.student.named_parameters())
        head = parameters.pop("lm_head.weight").grad
        below = [p.grad.flatten() for p in parameters.values() if p.grad is not None]
        found = {} if head is None else {"head": head}
        return found | ({"body": torch.cat(below)} if below else {})

    def answer(self, name: str) -> Answer:
        """Of one of the losses, through all logits in fp32."""
        self.forget()
        loss = float(_trained(lambda: self._loss(name)).detach())
        return Answer(loss, {key: value.clone() for key, value in self.gradients().items()})

    def facts(self) -> dict[str, float]:
        """Sizes of one fp32 [N, V] and of the student's gradients."""
        parameters = list(self.models.student.parameters())
        rows = int(self.models.supervised.sum())
        return {
            "rows": rows,
            "logits_mib": rows * self.settings.vocab * 4 / 2**20,
            "gradients_mib": sum(p.numel() * p.element_size() for p in parameters) / 2**20,
            "student_parameters": sum(p.numel() for p in parameters),
            "teacher_parameters": sum(p.numel() for p in self.models.teacher.parameters()),
        }

    def _loss(self, name: str) -> Tensor:
        """Mean over the supervised rows, through all logits of both models."""
        student = _rows_of(self.models, self.models.student_logits())
        labels = self.models.shifted[self.models.supervised]
        total = (
            F.cross_entropy(student, labels, reduction="sum")
            * {
                CE: 1.0,
                DIVERGENCE: 0.0,
                TOP: 0.0,
                MIXED: CE_WEIGHT,
            }[name]
        )
        if name != CE:
            teacher = _rows_of(self.models, self.models.teacher_logits())
            if name == TOP:
                top = TopK.of(teacher, self.top)
                student, teacher = coarsen(student, top.ids), top.targets()
            total = total + dense.values(self.loss, student, teacher, labels).sum()
        return total / len(labels)

    @property
    def top(self) -> int:
        """Tokens of a cached row."""
        return min(KEPT, self.settings.vocab - 1)

    def _parts(self) -> list[Arm]:
        """What a step is made of."""
        models = self.models

        def teacher_with_head() -> None:
            hidden = models.teacher_hidden()[:, :-1][models.supervised]
            with torch.no_grad():
                models.teacher.lm_head(hidden)

        def teacher_cached() -> None:
            models.teacher_logits(cache=True)

        def gemms() -> Run:
            with torch.no_grad():
                inputs = models.rows(models.teacher_hidden(), models.student_hidden())
            return floors.gemms(inputs, len(inputs), reused=True)()

        def part(name: str, run: Callable[[], Any], note: str = "") -> Arm:
            return Arm(name, "part", lambda: run, note)

        return [
            part(TEACHER_BODY, models.teacher_hidden),
            part(TEACHER, teacher_with_head, "supervised rows only"),
            part("teacher forward with head and cache", teacher_cached, "all rows, as GKD runs it"),
            part(STUDENT_BODY, lambda: models.student_hidden().sum().backward()),
            Arm(GEMMS, "floor", gemms, "on all supervised rows, outputs reused", memory=False),
            Arm(SFT, "part", lambda: models.step([CrossEntropy()], [1.0]), "no teacher", CE),
            Arm(SFT_DENSE, "part", lambda: lambda: _trained(lambda: self._loss(CE)), answer=CE),
        ]

    def _ours(self) -> list[Arm]:
        """Distiller and source, as DistillTrainer runs them for a micro-batch."""
        logits = Logits(loss=self.loss.function)

        def mixed() -> Run:
            return self.models.step([logits, CrossEntropy()], [1.0, CE_WEIGHT])

        return [
            Arm("ours", "ours", lambda: self.models.step([logits], [1.0]), answer=DIVERGENCE),
            Arm("ours + CE on labels", "ours", mixed, answer=MIXED),
            Arm(
                f"ours, cached top-{self.top}",
                "ours",
                self._cached,
                "no teacher in memory; targets and tail already read",
                TOP,
            ),
        ]

    def _cached(self) -> Run:
        """A step on the teacher's likeliest tokens."""
        models = self.models
        top = TopK.of(_rows_of(models, models.teacher_logits()), self.top)
        nothing = models.teacher_hidden()

        def forward() -> Tensor:
            inputs = models.rows(nothing, models.student_hidden())
            return ours.fused(inputs, self.loss.function, chunk=models.chunk, target=top)

        return lambda: _trained(forward)

    def _dense(self) -> Arm:
        """What most scripts do: all logits of both models, softmax in fp32, a mask."""

        def forward() -> Tensor:
            teacher, student = self.models.teacher_logits(), self.models.student_logits()
            kept = self.models.supervised
            values = dense.values(
                self.loss,
                student[:, :-1].float().flatten(0, 1),
                teacher[:, :-1].float().flatten(0, 1),
                self.models.shifted.flatten().clamp_min(0),
            )
            return (values * kept.flatten()).sum() / kept.sum()

        return Arm("naive KD", "dense", lambda: lambda: _trained(forward), "all rows", DIVERGENCE)


def _rows_of(models: Models, logits: Tensor) -> Tensor:
    """The supervised rows of `[B, T, V]` in fp32."""
    return logits[:, :-1][models.supervised].float()


def _trained(forward: Callable[[], Tensor]) -> Tensor:
    """Forward and backward."""
    loss = forward()
    loss.backward()
    return loss
