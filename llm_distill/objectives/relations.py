"""Relations among queries, keys and values: the student's vectors should relate as the teacher's.

No pair of heads is needed: the heads of a model are joined and split anew, so head counts, head
widths and grouped keys may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from llm_distill.attention import Kind
from llm_distill.layers import LayerStrategy, last
from llm_distill.losses.attention import map_kl
from llm_distill.losses.described import describe_function
from llm_distill.objectives.base import Evidence, QueryPlan, Term
from llm_distill.objectives.checks import check_row_function
from llm_distill.objectives.map_pass import map_pass
from llm_distill.objectives.map_terms import MapTerm, check_rows, checked_map, mixture, redraw_of
from llm_distill.objectives.mapped import Mapped
from llm_distill.rows import RowKind

if TYPE_CHECKING:
    from llm_distill.layers import LayerMap, Row
    from llm_distill.queries import Queries
    from llm_distill.signals import ModelSpec, Signals

PairLoss = Callable[[Tensor, Tensor], Tensor]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""What relations can be made of."""

TEACHER_LEAST, STUDENT_LEAST = 16, 4
"""Features of a relation head below which none is made by default: 48 heads from a teacher of width
768, 64 from one of 1,024, as published."""


@dataclass(frozen=True, kw_only=True)
class Relations(Mapped):
    """Relations `softmax(X X^T / sqrt(d))` of queries, keys and values; mean over pairs and rows.

    Formula: `sum_X a_X KL(R_X of the teacher || R_X of the student)`, mean over relation heads and
    query rows; X are the joined heads of a block after rotary embedding, split into relation heads
    of d features, under the mask of the attention.

    Attributes:
        loss: (student `[N, A, T]`, teacher `[N, A, T]`) -> `[N]`, for A relation heads.
        layers: By default the last block from the last. For teachers of 24 layers the paper takes
            one from the upper middle (21 of BERT, 19 of RoBERTa).
        of: Which of `query`, `key` and `value`; with a weight for each as `{query: 1.0, …}`.
        relation_heads: A, a divisor of all widths; None: the largest that leaves 16 features of the
            teacher and 4 of the student, as published.
        queries: Query rows per sequence, drawn anew in each epoch, the same for both models; None:
            all rows. The mean over all rows is what a sample stands for.
        rows: Among which rows they are drawn.

    Source: Wang et al. 2020 (MiniLMv2), arXiv 2012.15828, section 3.1; values alone: Wang et al.
    2020 (MiniLM), arXiv 2002.10957, section 3.2.
    """

    loss: PairLoss = map_kl
    layers: LayerStrategy = last
    of: Sequence[Kind] | Mapping[Kind, float] = KINDS
    relation_heads: int | None = None
    queries: int | None = 128
    rows: RowKind = "supervised"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_rows("Relations", self.queries, self.rows)
        check_row_function(self.loss, (2, 3, 4), "Relations")
        _check_kinds(self.of)
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(
                f"Relations: relation_heads is {self.relation_heads}; write a number >= 1, or "
                "leave it out"
            )

    @property
    def weights(self) -> dict[Kind, float]:
        """Of the kinds that take part."""
        given = self.of if isinstance(self.of, Mapping) else dict.fromkeys(self.of, 1.0)
        return {kind: float(weight) for kind, weight in given.items() if weight}

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to blocks, and split their widths."""
        del evidence
        mapping = checked_map(self, student, teacher, whole=True)
        kinds = tuple(self.weights)
        heads = self.relation_heads
        if heads is None:
            heads = default_heads(widths(student, kinds), widths(teacher, kinds))
        _check_heads(heads, kinds, student, teacher)
        return RelationsTerm(self, mapping, heads, redraw_of(self))

    def describe(self) -> str:
        """Loss, kinds and sampled rows."""
        weights = self.weights
        alike = set(weights.values()) == {1.0}
        kinds = [kind if alike else f"{weight:g} {kind}" for kind, weight in weights.items()]
        rows = "all" if self.queries is None else str(self.queries)
        return f"{describe_function(self.loss)}, {' + '.join(kinds)}, {rows} {self.rows} rows"


class RelationsTerm(MapTerm):
    """Bound `Relations`."""

    def __init__(
        self,
        spec: Relations,
        mapping: LayerMap,
        heads: int,
        redraw: Callable[..., LayerMap] | None = None,
    ) -> None:
        plan = QueryPlan(spec.queries, spec.rows)
        super().__init__(mapping, plan, whole=True, redraw=redraw)
        self.loss, self.weights, self.heads = spec.loss, spec.weights, heads
        self.notes = (*self.notes, f"relation heads: {heads}")

    def value(
        self, place: int, row: Row, student: Signals, teacher: Signals, queries: Queries
    ) -> Tensor:
        """The weighted sum over kinds and query rows of one row of the map."""
        del place

        def sides(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            return ours, mixture(row, theirs)

        total = torch.zeros((), device=queries.flat.device)
        own, others = student.heads(row.student), [teacher.heads(t) for t, _ in row.teacher]
        for kind, weight in self.weights.items():
            relation = own.relation(kind, self.heads, queries)
            targets = [other.relation(kind, self.heads, queries) for other in others]
            total = total + weight * map_pass(relation, targets, queries, self.loss, sides)
        return total


def widths(spec: ModelSpec, kinds: Sequence[Kind]) -> dict[Kind, int]:
    """Features of the joined heads of a block, kind by kind."""
    shapes = _shapes(spec)
    return {kind: math.prod(shapes[kind]) for kind in kinds}


def default_heads(student: Mapping[Kind, int], teacher: Mapping[Kind, int]) -> int:
    """The largest divisor of all widths that leaves enough features: 16 of the teacher, 4 of ours.

    >>> default_heads({"query": 384}, {"query": 768})
    48
    >>> default_heads({"query": 384}, {"query": 1024})
    64
    """
    common = math.gcd(*student.values(), *teacher.values())
    most = min(min(teacher.values()) // TEACHER_LEAST, min(student.values()) // STUDENT_LEAST)
    return max(n for n in _divisors(common) if n <= max(1, most))


def _shapes(spec: ModelSpec) -> dict[Kind, tuple[int, int]]:
    """Heads and features of each."""
    return {
        "query": (spec.heads, spec.head_dim),
        "key": (spec.kv_heads, spec.head_dim),
        "value": (spec.kv_heads, spec.value_dim),
    }


def _divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _check_kinds(of: Sequence[Kind] | Mapping[Kind, float]) -> None:
    """Refuse kinds that there are not, and weights that cannot be.

    Raises:
        ValueError: Naming them.
    """
    names = [of] if isinstance(of, str) else list(of)
    wrong = [name for name in names if name not in KINDS]
    if isinstance(of, str) or wrong or not names or len(set(names)) < len(names):
        raise ValueError(
            f"Relations: of is {of!r}; write some of {', '.join(KINDS)} as a list, each once, or "
            "with a weight for each"
        )
    weights = of.values() if isinstance(of, Mapping) else [1.0]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(
            f"Relations: of has weights {list(weights)}; write finite numbers >= 0, one at least "
            "> 0"
        )


def _check_heads(heads: int, kinds: Sequence[Kind], student: ModelSpec, teacher: ModelSpec) -> None:
    """Refuse relation heads that do not divide a width.

    Raises:
        ValueError: Naming the model, the width, and what would do.
    """
    common = math.gcd(*(w for s in (student, teacher) for w in widths(s, kinds).values()))
    for spec in (student, teacher):
        for kind, width in widths(spec, kinds).items():
            if width % heads:
                count, size = _shapes(spec)[kind]
                raise ValueError(
                    f"Relations: {heads} relation heads do not divide the {kind} width {width} of "
                    f"{spec.name} ({count} heads of {size}); write a divisor of all widths: "
                    f"{', '.join(map(str, _divisors(common)))}"
                )
