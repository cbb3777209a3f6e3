"""A start in which every block learns alone, from the teacher's state where its segment begins."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llm_distill import projectors

if TYPE_CHECKING:
    from llm_distill.layers import LayerMap
    from llm_distill.signals import Signals


class Blockwise(nn.Module):
    """Where the student's segments begin, and what they are given there.

    A row of the map says where a segment of student blocks ends, and in which teacher layer it
    should. The segment starts after the row below it, from that row's teacher layer; the first one
    from the teacher's embedding. So no gradient leaves a segment, and one backward trains all.

    Args:
        mapping: One teacher layer for each row, ascending on both sides, none of them the
            embedding.
        student_width: Features of the student.
        teacher_width: Of the teacher; an affine map goes to the student's where they differ.

    Raises:
        ValueError: For any other map.

    Source: blocks trained alone on the teacher's states before they work together: Blakeney et
    al. 2020 (parallel blockwise distillation), arXiv 2012.03096; as the first stage of converting
    one architecture into another: Bick et al. 2024 (MOHAWK), arXiv 2408.10189, stage 2.
    """

    def __init__(self, mapping: LayerMap, student_width: int, teacher_width: int) -> None:
        super().__init__()
        ends = [(row.student, row.teacher[0][0]) for row in mapping.rows]
        pairs = [(0, 0), *ends]
        alone = all(len(row.teacher) == 1 for row in mapping.rows) and not mapping.trained
        if not alone or not all(s < u and t <= v for (s, t), (u, v) in pairwise(pairs)):
            raise ValueError(
                "HiddenStates: blockwise needs a map with one teacher layer for each student "
                f"layer, both ascending; this one is {list(mapping.pairs)}; write "
                "layers: auto, uniform or provenance"
            )
        self._starts = tuple((s + 1, t) for s, t in pairs[:-1])
        make = projectors.identity if student_width == teacher_width else projectors.linear
        self.entries = nn.ModuleList(make(teacher_width, student_width) for _ in self._starts)

    @property
    def teacher_layers(self) -> frozenset[int]:
        """Where segments begin."""
        return frozenset(layer for _, layer in self._starts)

    def inputs(self, teacher: Signals) -> dict[int, Tensor]:
        """What the first block of each segment is given: block -> `[B, T, D]`."""
        given = {}
        for (block, layer), entry in zip(self._starts, self.entries, strict=True):
            weight = next(entry.parameters(), None)
            state = teacher.states[layer]
            given[block] = entry(state if weight is None else state.to(weight.dtype))
        return given


def rms(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean square of the difference, |s - t| / sqrt(D): `[N, D], [N, D] -> [N]`."""
    length: Tensor = torch.linalg.vector_norm(student - teacher, dim=-1)
    return length / math.sqrt(student.shape[-1])


__all__ = ["Blockwise", "rms"]
