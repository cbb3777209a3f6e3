"""Attention maps: each query of the student should look where the teacher's looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm_distill import heads as head_rules
from llm_distill.capture import refuse_layers
from llm_distill.layers import LayerMap, LayerStrategy, uniform
from llm_distill.losses.attention import map_kl
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

HeadRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PairLoss = Callable[[Tensor, Tensor], Tensor]

QUERY_CHUNK = 128
"""Query rows per sequence whose maps exist at one time; more are recomputed in the backward."""


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
