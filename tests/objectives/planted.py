"""Planted signals of two small models: every state, query, key and value a leaf that was drawn.

The same tokens say the same, wherever padding stands and whatever stands in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from llm_distill.attention import Heads
from llm_distill.binding import make_batch
from llm_distill.objectives import Evidence, Objective, QueryPlan, Term
from llm_distill.queries import Queries
from llm_distill.rows import Batch, example_keys, supervised_rows, valid_rows
from llm_distill.signals import ModelSpec, Request, Signals

Side = Literal["left", "right"]

LENGTHS = (9, 6, 8, 5)
"""Real tokens of the sequences; the first two thirds of each are a prompt."""
STUDENT = ModelSpec("student", "llama", 2, 6, 2, 40, kv_heads=2, head_dim=4, value_dim=4)
TEACHER = ModelSpec("teacher", "llama", 4, 10, 4, 40, kv_heads=2, head_dim=4, value_dim=4)
TWIN = replace(TEACHER, name="student")
"""A student of the teacher's shape."""


@dataclass(frozen=True)
class Layout:
    """How sequences are laid out.

    Attributes:
        order: Which sequences, in which order.
        side: Where padding stands.
        more: Columns of padding beside those that are needed.
        fill: What stands there.
        supervised: Whether anything is; `one`: a single token of each sequence.
    """

    order: Sequence[int] = tuple(range(len(LENGTHS)))
    side: Side = "left"
    more: int = 0
    fill: float = 0.0
    supervised: Literal["all", "one", "none"] = "all"


@dataclass
class Scene:
    """A batch and what both models say about it.

    Attributes:
        batch: Its rows and queries.
        student: With leaves.
        teacher: With leaves of its own, which nobody should reach.
        leaves: Of the student: what, and the tensor `[B, T, *]`.
        targets: Of the teacher.
    """

    batch: Batch
    student: Signals
    teacher: Signals
    leaves: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)

    def real(self, tensor: Tensor, sequence: int) -> Tensor:
        """The part of a `[B, T, *]` tensor at the real tokens of one of its sequences."""
        return tensor[sequence, self.batch.inputs["attention_mask"][sequence] == 1]

    def padding(self, tensor: Tensor) -> Tensor:
        """The part at padding."""
        return tensor[self.batch.inputs["attention_mask"] == 0]


def scene(
    layout: Layout = Layout(),
    *,
    student: ModelSpec = STUDENT,
    plan: QueryPlan | None = None,
    epoch: int = 0,
    dtype: torch.dtype = torch.float64,
    identical: bool = False,
) -> Scene:
    """Signals in a layout; `identical`: a student that says what the teacher says."""
    batch = _batch(layout, plan, epoch)
    read = plan is not None
    ours = _drawn(student, layout, dtype, seed=1 if identical else 0, attention=read)
    theirs = _drawn(TEACHER, layout, dtype, seed=1, attention=read)
    return Scene(
        batch,
        said("student", student, ours, batch),
        said("teacher", TEACHER, theirs, batch),
        ours,
        theirs,
    )


def bound(
    objective: Objective,
    student: ModelSpec = STUDENT,
    *,
    plan: QueryPlan | None = None,
    identical: bool = False,
) -> Term:
    """Its term, in float64; told of a scene where it asks for data."""
    torch.manual_seed(0)
    evidence = None
    if objective.survey(student, TEACHER) != (Request(), Request()):
        shown = scene(student=student, plan=plan, dtype=torch.float32, identical=identical)
        evidence = Evidence(shown.batch, shown.student, shown.teacher)
    term: Term = objective.build(student, TEACHER, evidence).double()
    return term


def said(source: str, spec: ModelSpec, drawn: dict[str, Tensor], batch: Batch) -> Signals:
    """As a reader gives them."""
    states = {k: drawn[f"hidden {k}"] for k in range(spec.depth + 1)}
    attention = {}
    if batch.queries is not None:
        mask = _visible(batch.queries, batch.inputs["attention_mask"])
        for block in range(1, spec.depth + 1):
            query, key, value = (
                drawn[f"{kind} {block}"].transpose(1, 2) for kind in ("query", "key", "value")
            )
            attention[block] = _heads(query, key, value, mask, batch.queries)
    return Signals(source, None, states, attention)


def tokens(sequence: int) -> Tensor:
    """Of one sequence; some occur in more than one."""
    generator = torch.Generator().manual_seed(sequence)
    return torch.randint(1, 40, (LENGTHS[sequence],), generator=generator)


def laid(parts: Sequence[Tensor], layout: Layout, fill: float) -> Tensor:
    """Sequences `[n_i, *]` side by side: `[B, T, *]`."""
    width = max(LENGTHS) + layout.more
    whole = parts[0].new_full((len(parts), width, *parts[0].shape[1:]), fill)
    for row, part in enumerate(parts):
        start = width - len(part) if layout.side == "left" else 0
        whole[row, start : start + len(part)] = part
    return whole


def _batch(layout: Layout, plan: QueryPlan | None, epoch: int) -> Batch:
    """Tokens, rows and queries."""
    ids = laid([tokens(k) for k in layout.order], layout, 0)
    mask = laid([torch.ones_like(tokens(k)) for k in layout.order], layout, 0)
    labels = laid([_labels(k, layout) for k in layout.order], layout, -100)
    rows = supervised_rows(ids, mask, labels, shift=True)
    collated = {
        "input_ids": ids,
        "attention_mask": mask,
        "rows": rows,
        "valid": valid_rows(ids, mask),
        "keys": example_keys(ids, mask),
    }
    return make_batch(collated, plan, seed=0, epoch=epoch)


def _labels(sequence: int, layout: Layout) -> Tensor:
    """-100 in the prompt."""
    ids = tokens(sequence)
    start = {"all": len(ids) // 3, "one": len(ids) - 1, "none": len(ids)}[layout.supervised]
    return torch.where(torch.arange(len(ids)) < start, -100, ids)


def _drawn(
    spec: ModelSpec, layout: Layout, dtype: torch.dtype, *, seed: int, attention: bool
) -> dict[str, Tensor]:
    """Every signal of a model `[B, T, *]`, a leaf each."""
    shapes: dict[str, tuple[int, ...]] = {
        f"hidden {k}": (spec.width,) for k in range(spec.depth + 1)
    }
    for block in range(1, spec.depth + 1) if attention else ():
        shapes[f"query {block}"] = (spec.heads, spec.head_dim)
        shapes[f"key {block}"] = (spec.kv_heads, spec.head_dim)
        shapes[f"value {block}"] = (spec.kv_heads, spec.value_dim)
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        parts = [_part(1000 * seed + 100 * k + number, (LENGTHS[k], *shape)) for k in layout.order]
        found[name] = laid([p.to(dtype) for p in parts], layout, layout.fill).requires_grad_()
    return found


@cache
def _part(seed: int, shape: tuple[int, ...]) -> Tensor:
    """What one sequence says somewhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3


def _heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, queries: Queries) -> Heads:
    """The attention of one block for the asked positions."""
    place = queries.position[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    scaling = float(query.shape[3]) ** -0.5
    return Heads(query.gather(2, place), key, mask, scaling, value=value, whole_query=query)


def _visible(queries: Queries, mask: Tensor) -> Tensor:
    """Real tokens up to the query: `[B, 1, R, T]`."""
    places = torch.arange(mask.shape[1])
    before = places[None, None, :] <= queries.position[:, :, None]
    return (before & (mask[:, None, :] == 1))[:, None]
