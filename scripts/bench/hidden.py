"""`hidden`: a distillation step, and what each match of hidden states adds to it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.binding import bind
from llm_distill.layers import last
from llm_distill.objectives import HiddenStates, Logits
from llm_distill.signals import ModelSpec
from scripts.bench import dense
from scripts.bench.arms import Answer, Arm, Benchmark
from scripts.bench.inputs import Loss
from scripts.bench.models import Models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.bench.measure import Run
    from scripts.bench.settings import HiddenSettings

BASE = "logits alone"
MATCHES = (2, 4)


class HiddenBenchmark(Benchmark):
    """Models and arms.

    Args:
        settings: What was asked for.
    """

    ratios: Mapping[str, tuple[str, ...]] = {f"x {BASE}": (BASE,)}
    lean = BASE

    def __init__(self, settings: HiddenSettings) -> None:
        self.settings: HiddenSettings = settings
        self.loss = Loss.parse(settings.loss)
        self.models = Models.build(settings)
        s = settings
        self.title = (
            f"hidden: {s.loss} and mse of projected states, student {s.student_layers} x "
            f"{s.student_width}, teacher {s.teacher_layers} x {s.teacher_width}, V={s.vocab:,}, "
            f"{s.batch} x {s.length} tokens, {s.dtype}, chunk {s.chunk}"
        )

    def arms(self) -> list[Arm]:
        """Logits, and hidden states beside them."""
        found = [Arm(BASE, "ours", partial(self._step, 0), answer=BASE)]
        for n in self._matches:
            name = f"+ {n} hidden states"
            found.append(Arm(name, "ours", partial(self._step, n), "a projector each", name))
        return found

    def forget(self) -> None:
        """Drop all gradients."""
        self.models.student.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Of all of the student, flat."""
        found = [p.grad.flatten() for p in self.models.student.parameters() if p.grad is not None]
        return {"student": torch.cat(found)} if found else {}

    def answer(self, name: str) -> Answer:
        """Through all logits and all hidden states."""
        self.forget()
        layers = 0 if name == BASE else int(name.split()[1])
        loss = self._dense(layers)
        loss.backward()
        found = {key: value.clone() for key, value in self.gradients().items()}
        return Answer(float(loss.detach()), found)

    def facts(self) -> dict[str, float]:
        """Sizes of one fp32 [N, V] and of the student's gradients."""
        rows = int(self.models.supervised.sum())
        parameters = self.models.student.parameters()
        return {
            "rows": rows,
            "logits_mib": rows * self.settings.vocab * 4 / 2**20,
            "gradients_mib": sum(p.numel() * p.element_size() for p in parameters) / 2**20,
        }

    @property
    def _matches(self) -> list[int]:
        """As many as the student has layers."""
        return [n for n in MATCHES if n <= self.settings.student_layers]

    def _objectives(self, layers: int) -> list[Any]:
        """Logits, and the last layers on the last."""
        logits = Logits(loss=self.loss.function)
        if not layers:
            return [logits]
        return [logits, HiddenStates(layers=partial(last, n=layers))]

    def _step(self, layers: int) -> Run:
        """A micro-batch of DistillTrainer."""
        objectives = self._objectives(layers)
        return self.models.step(objectives, [1.0] * len(objectives))

    def _dense(self, layers: int) -> Tensor:
        """The mean over supervised rows, and the mean over layers of the squared error."""
        models = self.models
        kept = models.supervised
        with torch.no_grad():
            theirs = _call(models.teacher, models.ids, layers > 0)
        ours = _call(models.student, models.ids, layers > 0)
        student, teacher = (out.logits[:, :-1][kept].float() for out in (ours, theirs))
        loss = dense.values(self.loss, student, teacher, models.shifted[kept]).mean()
        if not layers:
            return loss
        specs = [
            ModelSpec.of(m.config, n) for m, n in ((models.student, "s"), (models.teacher, "t"))
        ]
        term: Any = bind(self._objectives(layers), *specs, seed=0)["HiddenStates"]
        for (s, t), projector in zip(term.mapping.pairs, term.projectors, strict=True):
            states = projector.to(models.ids.device)(ours.hidden_states[s][:, :-1][kept])
            target = theirs.hidden_states[t][:, :-1][kept]
            width = states.shape[-1:]
            error = F.mse_loss(F.layer_norm(states, width), F.layer_norm(target, width))
            loss = loss + error / layers
        return loss


def _call(model: Any, ids: Tensor, states: bool) -> Any:  # noqa: ANN401, FBT001  private, HF
    """A forward pass, with all hidden states where they are wanted."""
    return model(input_ids=ids, use_cache=False, output_hidden_states=states)
