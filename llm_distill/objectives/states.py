"""The bound form of `HiddenStates`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_distill import projectors
from llm_distill.losses.features import unit
from llm_distill.losses.softmax import wide
from llm_distill.objectives.base import Evidence, Term
from llm_distill.objectives.blockwise import Blockwise, rms
from llm_distill.objectives.checks import check_evidence
from llm_distill.objectives.gate import SUMS, Gate, Watch
from llm_distill.picks import Pick, Picked, pairs_texts, pick
from llm_distill.signals import Request, Signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.layers import LayerMap, Row
    from llm_distill.rows import Batch, Step

Normalization = Literal["none", "layer", "l2"]

ENOUGH = 2
"""Rows per feature of the student below which a fit says little of other rows."""

LATER = "projectors: least squares, decided at calibration"
"""What a table says before it."""

ANCHOR = 0.1
"""Weight of the divergence of learned shares from where they started: without it they slide to the
layer that is easiest, not to the one that teaches most."""


@dataclass(frozen=True)
class Comparison:
    """How two layers are compared.

    Attributes:
        loss: (student, teacher) -> one value per row.
        choice: Of rows and items.
        normalize: What both sides go through.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    choice: Pick
    normalize: Normalization = "layer"


class HiddenStatesTerm(Term):
    """One projector for each row of the map.

    Args:
        comparison: Of a student's layer with its target.
        mapping: Decided, or that of epoch 0 of one that is drawn anew.
        modules: A projector for each row of the map.
        redraw: The strategy of a map that is drawn anew in each epoch.
        gated: Whether it lets go once its gradient is against the rest (`objectives.gate`).
        start: Where blocks begin while they learn alone, and until which progress; None: never.
    """

    mapping: LayerMap

    def __init__(
        self,
        comparison: Comparison,
        mapping: LayerMap,
        modules: Sequence[nn.Module],
        *,
        redraw: Callable[..., LayerMap] | None = None,
        gated: bool = False,
        start: tuple[Blockwise, float] | None = None,
    ) -> None:
        every = frozenset(range(1, mapping.teacher_depth + 1))
        super().__init__(
            Request(hidden=mapping.student_layers),
            Request(hidden=mapping.teacher_layers if redraw is None else every),
            rows=comparison.choice.rows,
            notes=str(mapping).splitlines(),
        )
        self.loss, self.choice = comparison.loss, comparison.choice
        self.normalize = comparison.normalize
        self.mapping, self._redraw = mapping, redraw
        self.gate = Gate() if gated else None
        self.observes = SUMS if gated else 0
        self.blockwise: Blockwise | None = start[0] if start else None
        self._until = start[1] if start else 0.0
        if self.blockwise is not None:
            self.teacher = self.teacher | Request(hidden=self.blockwise.teacher_layers)
            self.notes = (*self.notes, f"blockwise: each block alone until {self._until:.0%}")
        self.projectors = nn.ModuleList(modules)
        learned = mapping.rows if mapping.trained else ()
        self.shares = nn.ParameterList(nn.Parameter(_logs(row)) for row in learned)

    @property
    def aligned(self) -> bool:
        """Not where the means of whole texts are compared; blocks alone start from tokens."""
        return self.blockwise is not None or not pairs_texts(self.choice)

    def count(self, batch: Batch) -> int:
        """Tokens or sequences that are compared."""
        return pick(batch, self.choice).items

    def skipped(self, batch: Batch) -> int:
        """Groups too small for the loss."""
        return pick(batch, self.choice).skipped

    def least_sequences(self) -> int:
        """As many as the loss relates, where each gives one item to a rank's group."""
        return self.choice.least if self.choice.items == "pooled" else 1

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """Mean over rows of the map of the sum over items."""
        picked = pick(batch, self.choice)
        if step.alone:
            return self._alone(student, teacher, picked)
        mapping = self._mapping(batch)
        student = self._watched(student)
        device = batch.supervised.index.device
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for place, row in enumerate(mapping.rows):
                ours = self._ours(place, student.hidden(row.student, picked.rows), picked)
                theirs = self._theirs(place, row, teacher, picked.for_teacher)
                total = total + row.weight * picked.total(self.loss, ours, theirs)
        total = total / sum(row.weight for row in mapping.rows)
        return total + ANCHOR * picked.items * self._drift() if len(self.shares) else total

    def figures(self) -> dict[str, float]:
        """The cosine that the gate goes by."""
        cosine = math.nan if self.gate is None else float(self.gate.cosine)
        return {} if math.isnan(cosine) else {"cosine": cosine}

    def alone(self, progress: float) -> bool:
        """Whether every block learns alone now, and nothing else is trained."""
        return progress < self._until

    def starts(self, teacher: Signals) -> dict[int, Tensor]:
        """Where blocks begin while they learn alone: block -> `[B, T, D]`."""
        return {} if self.blockwise is None else self.blockwise.inputs(teacher)

    def factor(self) -> Tensor | None:
        """How far the gate is open."""
        return None if self.gate is None else self.gate.value

    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        """Tell the gate."""
        del value
        if self.gate is not None and observed is not None:
            self.gate.after_step(observed, progress)

    def move(self, mapping: LayerMap) -> None:
        """As any term; what a projector was fitted to is another layer now."""
        super().move(mapping)
        self.notes = tuple(note for note in self.notes if not note.startswith("projector "))

    def fit(self, evidence: Evidence | None, *, asked: bool) -> None:
        """Start every projector at its closed-form optimum.

        Args:
            evidence: None: later.
            asked: Whether the user did; else too few rows leave projectors as they are.

        Raises:
            ValueError: For a projector without one, or no rows, where that was asked for.
        """
        if evidence is None:
            for projector in self.projectors:
                projectors.checked_fit(projector)
            self.notes = (*self.notes, LATER)
            return
        told = self._moments(evidence)
        rows, width = told[0].rows, len(told[0].student)
        if not asked and rows < ENOUGH * width:
            few = f"{rows} rows at calibration are too few for {width} features"
            self.notes = (*self.notes, f"projectors: random, {few}")
            return
        check_evidence(rows, "HiddenStates")
        for row, projector, moments in zip(self.mapping.rows, self.projectors, told, strict=True):
            left = projectors.fit(projector, moments)
            fit = f"least squares on {rows} rows leaves {left:.1%} of the variance"
            names = "+".join(str(layer) for layer, _ in row.teacher)
            self.notes = (*self.notes, f"projector {row.student} -> {names}: {fit}")

    def _moments(self, evidence: Evidence) -> list[projectors.Moments]:
        """What a fit needs of the rows of each pair, batch after batch."""
        told: list[projectors.Moments] = []
        for each in evidence.every():
            picked = pick(each.batch, self.choice)
            for place, row in enumerate(self.mapping.rows):
                ours = picked.gather(each.student.hidden(row.student, picked.rows))
                theirs = self._theirs(place, row, each.teacher, picked.for_teacher)
                if len(told) == place:
                    told.append(projectors.Moments.of(ours, theirs))
                else:
                    told[place].add(ours, theirs)
        return told

    def _alone(self, student: Signals, teacher: Signals, picked: Picked) -> Tensor:
        """Root mean square distance of each segment's end, mean over segments, sum over items."""
        device = picked.rows.index.device
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for row, projector in zip(self.mapping.rows, self.projectors, strict=True):
                (layer, _), rows = row.teacher[0], picked.rows
                ours = _projected(projector, picked.gather(student.hidden(row.student, rows)))
                theirs = picked.gather(wide(teacher.hidden(layer, rows)))
                total = total + row.weight * picked.total(rms, ours, theirs)
        return total / sum(row.weight for row in self.mapping.rows)

    def _watched(self, student: Signals) -> Signals:
        """The student's signals, the hint's gradient apart from the rest where a gate watches."""
        if self.gate is None or self.observed is None:
            return student
        layers = sorted(self.student.hidden)
        watch = Watch(self.observed, layers[-1])
        own = {layer: watch.own(student.states[layer], layer) for layer in layers}
        return replace(student, states={**student.states, **own})

    def _mapping(self, batch: Batch) -> LayerMap:
        """The map of this epoch."""
        if self._redraw is None:
            return self.mapping
        depths = self.mapping.student_depth, self.mapping.teacher_depth
        return self._redraw(*depths, epoch=batch.draw.epoch)

    def _ours(self, place: int, states: Tensor, picked: Picked) -> Tensor:
        """The student's side of one row of the map."""
        return self._normal(_projected(self.projectors[place], picked.gather(states)))

    def _theirs(self, place: int, row: Row, teacher: Signals, picked: Picked) -> Tensor:
        """The teacher's side: each layer normalised, then mixed."""
        sides = [
            self._normal(picked.gather(wide(teacher.hidden(layer, picked.rows).detach())))
            for layer, _ in row.teacher
        ]
        if len(sides) == 1:
            return sides[0]
        shares = self.shares[place].softmax(0) if len(self.shares) else None
        weights = [share for _, share in row.teacher] if shares is None else shares.unbind()
        mixed = [weight * side for weight, side in zip(weights, sides, strict=True)]
        return torch.stack(mixed).sum(0)

    def _drift(self) -> Tensor:
        """Divergence of the learned shares from where they started, mean over rows of the map."""
        drifts = []
        for row, logits in zip(self.mapping.rows, self.shares, strict=True):
            start = _logs(row).to(logits, non_blocking=True)
            now = logits.log_softmax(0)
            drifts.append((now.exp() * (now - start)).sum())
        return torch.stack(drifts).mean()

    def _normal(self, states: Tensor) -> Tensor:
        """Row by row: `[N, D] -> [N, D]`."""
        if self.normalize == "layer":
            return F.layer_norm(states, states.shape[-1:])
        return unit(states) if self.normalize == "l2" else states


def _logs(row: Row) -> Tensor:
    """Of the shares of a row, `[layers]`; some are too small for fp32."""
    return torch.tensor([math.log(share) for _, share in row.teacher])


def _projected(projector: nn.Module, states: Tensor) -> Tensor:
    """Through the projector in its own dtype, then fp32 or better."""
    weight = next(projector.parameters(), None)
    return wide(projector(states if weight is None else states.to(weight.dtype)))
