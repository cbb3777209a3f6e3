"""Objectives on what happens inside: hidden states and attention maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_distill import heads as head_rules
from llm_distill import projectors
from llm_distill.capture import refuse_layers
from llm_distill.layers import LayerMap, LayerStrategy, uniform
from llm_distill.losses.attention import map_kl
from llm_distill.losses.features import mse, unit
from llm_distill.objectives.base import (
    Evidence,
    Objective,
    QueryPlan,
    Term,
    check_choice,
    check_evidence,
    check_row_function,
    describe_function,
)
from llm_distill.rows import Batch, Queries, RowKind, Step
from llm_distill.signals import Heads, ModelSpec, Request, Signals

Normalization = Literal["none", "layer", "l2"]
HeadRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PairLoss = Callable[[Tensor, Tensor], Tensor]

QUERY_CHUNK = 128
"""Query rows per sequence whose maps exist at one time; more are recomputed in the backward."""


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


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Objective):
    """Attention probabilities of mapped blocks, on sampled query rows. Mean over pairs and rows.

    Attributes:
        loss: (student `[N, H, T]`, teacher `[N, H, T]`) -> `[N]`.
        layers: Strategy that pairs blocks.
        heads: How head counts are brought together: `mean`, `group` or `match`
            (`llm_distill.heads`).
        queries: Query rows per sequence, drawn anew in each epoch, the same for both models; None:
            all rows.
        rows: Among which rows they are drawn.

    Source: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, equation 7; Wang et al. 2020 (MiniLM),
    arXiv 2002.10957.
    """

    loss: PairLoss = map_kl
    layers: LayerStrategy = uniform
    heads: HeadRule | Callable[..., tuple[Tensor, Tensor]] = head_rules.mean
    queries: int | None = 128
    rows: RowKind = "supervised"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_choice("AttentionMaps: rows", self.rows, ("supervised", "valid"))
        if self.queries is not None and self.queries < 1:
            raise ValueError(
                f"AttentionMaps: queries is {self.queries}; write a number >= 1, or null for all "
                "rows"
            )
        check_row_function(self.loss, (2, 3, 4), "AttentionMaps")

    @property
    def matched(self) -> bool:
        """Whether heads are assigned from data."""
        return getattr(self.heads, "func", self.heads) is head_rules.match

    def survey(self, student: ModelSpec, teacher: ModelSpec) -> tuple[Request, Request]:
        """The mapped blocks, where heads are matched."""
        if not self.matched:
            return Request(), Request()
        mapping = self.layers(student.depth, teacher.depth)
        return Request(heads=mapping.student_layers), Request(heads=mapping.teacher_layers)

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to blocks and heads."""
        mapping = self.layers(student.depth, teacher.depth)
        refuse_layers(Request(heads=mapping.student_layers), student)
        refuse_layers(Request(heads=mapping.teacher_layers), teacher)
        if self.heads is head_rules.group:
            head_rules.check_group(student.heads, teacher.heads)
        if self.matched:
            head_rules.check_match(student.heads, teacher.heads)
        term = AttentionMapsTerm(self, mapping, student.heads)
        if self.matched:
            term.match(evidence)
        return term

    def describe(self) -> str:
        """Loss, head rule and sampled rows."""
        rows = "all" if self.queries is None else str(self.queries)
        loss, rule = describe_function(self.loss), describe_function(self.heads)
        return f"{loss}, heads {rule}, {rows} {self.rows} rows"


class AttentionMapsTerm(Term):
    """Bound `AttentionMaps`; matched heads are a buffer, saved and resumed."""

    def __init__(self, spec: AttentionMaps, mapping: LayerMap, student_heads: int) -> None:
        super().__init__(
            Request(heads=mapping.student_layers),
            Request(heads=mapping.teacher_layers),
            rows=spec.rows,
            queries=QueryPlan(spec.queries, spec.rows),
            notes=str(mapping).splitlines(),
        )
        self.spec = spec
        self.mapping = mapping
        if spec.matched:
            self.register_buffer(
                "assignment", torch.arange(student_heads).repeat(len(mapping.pairs), 1)
            )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """Mean over pairs of the sum over query rows."""
        del step
        queries = cast("Queries", batch.queries)
        device = queries.flat.device
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for pair, (s, t) in enumerate(self.mapping.pairs):
                total = total + self._pair(pair, student.heads(s), teacher.heads(t), queries)
        return total / len(self.mapping.pairs)

    def match(self, evidence: Evidence | None) -> None:
        """Assign a teacher head to each student head, pair by pair."""
        if evidence is None:
            self.notes = (*self.notes, "heads: matched, decided at calibration")
            return
        queries = cast("Queries", evidence.batch.queries)
        check_evidence(len(queries), "AttentionMaps")
        for pair, (s, t) in enumerate(self.mapping.pairs):
            ours, theirs = evidence.student.heads(s), evidence.teacher.heads(t)
            chosen = head_rules.best_match(ours.maps(queries), theirs.maps(queries))
            cast("Tensor", self.assignment)[pair] = chosen
            self.notes = (*self.notes, f"heads of {s} -> heads of {t}: {chosen.tolist()}")

    def _pair(self, pair: int, student: Heads, teacher: Heads, queries: Queries) -> Tensor:
        """The sum over query rows of one pair, in chunks where there are many."""
        width = queries.position.shape[1]
        if width <= QUERY_CHUNK:
            return self._values(pair, student, teacher, queries, slice(None))
        parts = [
            slice(start, min(start + QUERY_CHUNK, width)) for start in range(0, width, QUERY_CHUNK)
        ]
        sums = [
            checkpoint(self._values, pair, student, teacher, queries, p, use_reentrant=False)
            for p in parts
        ]
        return torch.stack(cast("list[Tensor]", sums)).sum()

    def _values(
        self, pair: int, student: Heads, teacher: Heads, queries: Queries, part: slice
    ) -> Tensor:
        """The sum over one chunk of query rows."""
        rule = self.spec.heads
        if self.spec.matched:
            rule = partial(head_rules.match, assignment=cast("Tensor", self.assignment)[pair])
        with torch.no_grad():
            theirs = teacher.maps(queries, part)
        return self.spec.loss(*rule(student.maps(queries, part), theirs)).sum()


def _projected(projector: nn.Module, states: Tensor) -> Tensor:
    """Through the projector in its own dtype, then fp32 or better."""
    weight = next(projector.parameters(), None)
    return _wide(projector(states if weight is None else states.to(weight.dtype)))


def _wide(states: Tensor) -> Tensor:
    """fp32, or float64 where it was."""
    return states if states.dtype == torch.float64 else states.float()
