"""Attention maps: each query of the student should look where the teacher's looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llm_distill import heads as head_rules
from llm_distill.layers import stays
from llm_distill.losses.attention import map_kl
from llm_distill.losses.described import describe_function
from llm_distill.objectives.base import Evidence, QueryPlan, Term
from llm_distill.objectives.checks import check_evidence, check_row_function
from llm_distill.objectives.map_pass import map_pass
from llm_distill.objectives.map_terms import (
    MapTerm,
    check_rows,
    checked_map,
    mixture,
    redraw_of,
)
from llm_distill.objectives.mapped import Mapped
from llm_distill.rows import RowKind
from llm_distill.signals import ModelSpec, Request, Signals

if TYPE_CHECKING:
    from llm_distill.layers import LayerMap, Row
    from llm_distill.queries import Queries

HeadRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PairLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Mapped):
    """Attention probabilities of mapped blocks, on sampled query rows. Mean over pairs and rows.

    Attributes:
        loss: (student `[N, H, T]`, teacher `[N, H, T]`) -> `[N]`.
        heads: How head counts are brought together: `mean`, `group` or `match`
            (`llm_distill.heads`).
        queries: Query rows per sequence, drawn anew in each epoch, the same for both models; None:
            all rows. The mean over all rows is what a sample stands for.
        rows: Among which rows they are drawn.

    Source: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, equation 7; Wang et al. 2020 (MiniLM),
    arXiv 2002.10957.
    """

    loss: PairLoss = map_kl
    heads: HeadRule | Callable[..., tuple[Tensor, Tensor]] = head_rules.mean
    queries: int | None = 128
    rows: RowKind = "supervised"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_rows("AttentionMaps", self.queries, self.rows)
        check_row_function(self.loss, (2, 3, 4), "AttentionMaps")

    @property
    def matched(self) -> bool:
        """Whether heads are assigned from data."""
        return getattr(self.heads, "func", self.heads) is head_rules.match

    def survey(self, student: ModelSpec, teacher: ModelSpec) -> tuple[Request, Request]:
        """The mapped blocks, where heads are matched."""
        if not self.matched:
            return Request(), Request()
        mapping = self.mapping(student, teacher)
        return Request(heads=mapping.student_layers), Request(heads=mapping.teacher_layers)

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to blocks and heads."""
        mapping = checked_map(self, student, teacher)
        redraw = redraw_of(self)
        if self.heads is head_rules.group:
            head_rules.check_group(student.heads, teacher.heads)
        if self.matched:
            head_rules.check_match(student.heads, teacher.heads)
        if self.matched and not stays(self.layers):
            raise ValueError(
                "AttentionMaps: heads: match is decided for the blocks of one map, and "
                f"{describe_function(self.layers)} changes it in the training; use heads: mean or "
                "group, or layers that stay (random: write its epoch down; cka: leave refresh out)"
            )
        term = AttentionMapsTerm(self, mapping, student.heads, redraw)
        if self.matched:
            term.match(evidence)
        return term

    def describe(self) -> str:
        """Loss, head rule and sampled rows."""
        rows = "all" if self.queries is None else str(self.queries)
        loss, rule = describe_function(self.loss), describe_function(self.heads)
        return f"{loss}, heads {rule}, {rows} {self.rows} rows"


class AttentionMapsTerm(MapTerm):
    """Bound `AttentionMaps`; matched heads are a buffer, saved and resumed."""

    def __init__(
        self,
        spec: AttentionMaps,
        mapping: LayerMap,
        student_heads: int,
        redraw: Callable[..., LayerMap] | None = None,
    ) -> None:
        super().__init__(mapping, QueryPlan(spec.queries, spec.rows), redraw=redraw)
        self.spec = spec
        self._first = (
            torch.tensor([0, *(len(row.teacher) for row in mapping.rows)]).cumsum(0).tolist()
        )
        if spec.matched:
            self.register_buffer(
                "assignment", torch.arange(student_heads).repeat(len(mapping.pairs), 1)
            )

    def value(
        self, place: int, row: Row, student: Signals, teacher: Signals, queries: Queries
    ) -> Tensor:
        """The weighted sum over query rows of one row of the map."""
        rules = [self._rule(self._first[place] + entry) for entry in range(len(row.teacher))]

        def sides(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            pairs = [rule(ours, side) for rule, side in zip(rules, theirs, strict=True)]
            return pairs[0][0], mixture(row, [side for _, side in pairs])

        blocks = [teacher.heads(layer) for layer, _ in row.teacher]
        return map_pass(student.heads(row.student), blocks, queries, self.spec.loss, sides)

    def match(self, evidence: Evidence | None) -> None:
        """Assign a teacher head to each student head, for each teacher block of each row."""
        if evidence is None:
            self.notes = (*self.notes, "heads: matched, decided at calibration")
            return
        queries = cast("Queries", evidence.batch.queries)
        check_evidence(len(queries), "AttentionMaps")
        for entry, (s, t) in enumerate(self.mapping.pairs):
            ours, theirs = evidence.student.heads(s), evidence.teacher.heads(t)
            chosen = head_rules.best_match(ours.maps(queries), theirs.maps(queries))
            cast("Tensor", self.assignment)[entry] = chosen
            self.notes = (*self.notes, f"heads of {s} -> heads of {t}: {chosen.tolist()}")

    def _rule(self, entry: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """How heads are brought together with one teacher block."""
        if not self.spec.matched:
            return self.spec.heads
        return partial(head_rules.match, assignment=cast("Tensor", self.assignment)[entry])
