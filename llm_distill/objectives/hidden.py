"""Hidden states: the student's, projected, should be the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_distill import projectors
from llm_distill.layers import LayerMap, LayerStrategy, uniform
from llm_distill.losses.features import mse, unit
from llm_distill.objectives.base import (
    Evidence,
    Objective,
    Term,
    check_choice,
    check_evidence,
    check_row_function,
    describe_function,
)
from llm_distill.rows import Batch, RowKind, Step
from llm_distill.signals import ModelSpec, Request, Signals

Normalization = Literal["none", "layer", "l2"]
PairLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Objective):
    """Hidden states of mapped layers, projected where widths differ; mean over pairs and tokens.

    Attributes:
        loss: (projected student `[N, D]`, teacher `[N, D]`) -> `[N]`.
        layers: Strategy that pairs layers (`llm_distill.layers`).
        projector: From the student's width to the teacher's (`llm_distill.projectors`); by default
            identity for equal widths and linear otherwise, one for each pair.
        init: `random`, or `least_squares`: linear projectors start at the closed-form optimum of
            one calibration batch.
        normalize: What both sides go through before the loss, token by token: `layer` (zero mean,
            unit variance; the residual stream grows with depth), `l2` (unit length), `none`.
        rows: `supervised` predictions, or every `valid` token.

    Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, equation 3.
    """

    loss: PairLoss = mse
    layers: LayerStrategy = uniform
    projector: Callable[[int, int], nn.Module] | None = None
    init: Literal["random", "least_squares"] = "random"
    normalize: Normalization = "layer"
    rows: RowKind = "supervised"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_choice("HiddenStates: init", self.init, ("random", "least_squares"))
        check_choice("HiddenStates: normalize", self.normalize, ("none", "layer", "l2"))
        check_choice("HiddenStates: rows", self.rows, ("supervised", "valid"))
        check_row_function(self.loss, (2, 3), "HiddenStates")

    def survey(self, student: ModelSpec, teacher: ModelSpec) -> tuple[Request, Request]:
        """The mapped layers, where projectors are fitted."""
        if self.init == "random":
            return Request(), Request()
        mapping = self.layers(student.depth, teacher.depth)
        return Request(hidden=mapping.student_layers), Request(hidden=mapping.teacher_layers)

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to layers and widths; fit the projectors if there is evidence for it."""
        mapping = self.layers(student.depth, teacher.depth)
        make = self.projector or (
            projectors.identity if student.width == teacher.width else projectors.linear
        )
        term = HiddenStatesTerm(
            self, mapping, [make(student.width, teacher.width) for _ in mapping.pairs]
        )
        if self.init == "least_squares":
            term.fit(evidence)
        return term

    def describe(self) -> str:
        """Loss, normalisation and rows."""
        return f"{describe_function(self.loss)}, normalize {self.normalize}, {self.rows} rows"


class HiddenStatesTerm(Term):
    """Bound `HiddenStates`: one projector for each pair."""

    def __init__(self, spec: HiddenStates, mapping: LayerMap, modules: Sequence[nn.Module]) -> None:
        super().__init__(
            Request(hidden=mapping.student_layers),
            Request(hidden=mapping.teacher_layers),
            rows=spec.rows,
            notes=str(mapping).splitlines(),
        )
        self.spec = spec
        self.mapping = mapping
        self.projectors = nn.ModuleList(modules)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """Mean over pairs of the sum over rows."""
        del step
        rows = batch.rows(self.rows)
        device = batch.supervised.index.device
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for (s, t), projector in zip(self.mapping.pairs, self.projectors, strict=True):
                ours = self._normal(_projected(projector, student.hidden(s, rows)))
                theirs = self._normal(_wide(teacher.hidden(t, rows)))
                total = total + self.spec.loss(ours, theirs).sum()
        return total / len(self.mapping.pairs)

    def fit(self, evidence: Evidence | None) -> None:
        """Start every linear projector at its least-squares optimum."""
        linear = [p for p in self.projectors if isinstance(p, nn.Linear) and p.bias is not None]
        if len(linear) < len(self.projectors):
            raise ValueError(
                "HiddenStates: init least_squares needs linear projectors; write projector: linear"
            )
        if evidence is None:
            self.notes = (*self.notes, "projectors: least squares, decided at calibration")
            return
        rows = evidence.batch.rows(self.rows)
        check_evidence(len(rows), "HiddenStates")
        for (s, t), projector in zip(self.mapping.pairs, linear, strict=True):
            target = self._normal(_wide(evidence.teacher.hidden(t, rows)))
            left = projectors.fit_least_squares(projector, evidence.student.hidden(s, rows), target)
            fit = f"least squares on {len(rows)} tokens leaves {left:.1%} of the variance"
            self.notes = (*self.notes, f"projector {s} -> {t}: {fit}")

    def _normal(self, states: Tensor) -> Tensor:
        """Per-token normalisation: `[N, D] -> [N, D]`."""
        if self.spec.normalize == "layer":
            return F.layer_norm(states, states.shape[-1:])
        return unit(states) if self.spec.normalize == "l2" else states


def _projected(projector: nn.Module, states: Tensor) -> Tensor:
    """Through the projector in its own dtype, then fp32 or better."""
    weight = next(projector.parameters(), None)
    return _wide(projector(states if weight is None else states.to(weight.dtype)))


def _wide(states: Tensor) -> Tensor:
    """fp32, or float64 where it was."""
    return states if states.dtype == torch.float64 else states.float()
