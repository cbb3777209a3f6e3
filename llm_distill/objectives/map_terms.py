"""What terms on maps share: rows of a layer map, sampled query rows, mixtures of teacher blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llm_distill.capture import refuse_layers
from llm_distill.layers import asks
from llm_distill.objectives.base import QueryPlan, Term
from llm_distill.objectives.checks import check_choice
from llm_distill.signals import Request, Signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_distill.layers import LayerMap, Row
    from llm_distill.objectives.mapped import Mapped
    from llm_distill.queries import Queries
    from llm_distill.rows import Batch, Step
    from llm_distill.signals import ModelSpec


class MapTerm(Term):
    """Mean over rows of a layer map of the sum over query rows.

    Args:
        mapping: Decided, or that of epoch 0 of one that is drawn anew.
        plan: Of the query rows.
        whole: Whether whole queries, keys and values are read, and not maps alone.
        redraw: The strategy of a map that is drawn anew in each epoch.
    """

    mapping: LayerMap

    def __init__(
        self,
        mapping: LayerMap,
        plan: QueryPlan,
        *,
        whole: bool = False,
        redraw: Callable[..., LayerMap] | None = None,
    ) -> None:
        every = frozenset(range(1, mapping.teacher_depth + 1))
        theirs = mapping.teacher_layers if redraw is None else every
        super().__init__(
            request(mapping.student_layers, whole=whole),
            request(theirs, whole=whole),
            rows=plan.rows,
            queries=plan,
            notes=str(mapping).splitlines(),
        )
        self.mapping, self._redraw = mapping, redraw

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """Weighted mean over rows of the map of the weighted sum over query rows."""
        del step
        queries = cast("Queries", batch.queries)
        device = queries.flat.device
        mapping = self._mapping(batch)
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for place, row in enumerate(mapping.rows):
                value = self.value(place, row, student, teacher, queries)
                total = total + row.weight * value
        return total / sum(row.weight for row in mapping.rows)

    def value(
        self, place: int, row: Row, student: Signals, teacher: Signals, queries: Queries
    ) -> Tensor:
        """The weighted sum over query rows of one row of the map."""
        raise NotImplementedError

    def _mapping(self, batch: Batch) -> LayerMap:
        """The map of this epoch."""
        if self._redraw is None:
            return self.mapping
        depths = self.mapping.student_depth, self.mapping.teacher_depth
        return self._redraw(*depths, epoch=batch.draw.epoch)


def request(blocks: frozenset[int], *, whole: bool) -> Request:
    """Attention of some blocks."""
    return Request(relations=blocks) if whole else Request(heads=blocks)


def checked_map(
    objective: Mapped, student: ModelSpec, teacher: ModelSpec, *, whole: bool = False
) -> LayerMap:
    """The layer map of an objective on maps.

    Raises:
        ValueError: For a block that one of the models does not have, attention that cannot be read,
            or shares that are to be trained.
    """
    mapping = objective.mapping(student, teacher)
    owner = type(objective).__name__
    if mapping.trained:
        raise ValueError(
            f"{owner}: layers has shares that are trained ({mapping.origin}), and maps are mixed "
            "with fixed shares alone; write a strategy that decides, such as auto, or give these "
            "layers to HiddenStates"
        )
    refuse_layers(request(mapping.student_layers, whole=whole), student)
    refuse_layers(request(mapping.teacher_layers, whole=whole), teacher)
    return mapping


def redraw_of(objective: Mapped) -> Callable[..., LayerMap] | None:
    """The strategy of a map that is drawn anew in each epoch; None where it stays."""
    return objective.layers if "epoch" in asks(objective.layers) else None


def check_rows(owner: str, queries: int | None, rows: str) -> None:
    """Refuse query rows that cannot be drawn.

    Raises:
        ValueError: Naming the setting.
    """
    check_choice(f"{owner}: rows", rows, ("supervised", "valid"))
    if queries is not None and queries < 1:
        raise ValueError(
            f"{owner}: queries is {queries}; write a number >= 1, or null for all rows"
        )


def mixture(row: Row, sides: Sequence[Tensor]) -> Tensor:
    """The target of a row of a layer map: maps of its teacher blocks, mixed by their shares."""
    if len(sides) == 1:
        return sides[0]
    mixed = [share * side for (_, share), side in zip(row.teacher, sides, strict=True)]
    return torch.stack(mixed).sum(0)
