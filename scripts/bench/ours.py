"""The head pass of llm_distill on bare inputs: the one place that knows how it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_distill.losses.fused import head_pass
from llm_distill.losses.projection import Projection
from llm_distill.losses.rowwise import Nll, RowTerm, Tempered

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_distill.losses.sparse import TopK
    from scripts.bench.inputs import Inputs


def fused(
    inputs: Inputs,
    divergence: Callable[..., Tensor],
    *,
    chunk: int | None = None,
    ce: float = 0.0,
    target: TopK | None = None,
) -> Tensor:
    """The mean loss, its gradients already computed.

    Args:
        inputs: Rows and heads.
        divergence: Between the two distributions.
        chunk: Rows of one GEMM; the head pass decides by default.
        ce: Weight of cross-entropy on the labels.
        target: What the teacher says, in place of its hidden states.
    """
    terms: list[RowTerm] = [Tempered(divergence, width=len(inputs.student_weight))]
    terms += [Nll()] if ce else []
    shares = torch.tensor([1.0, ce][: len(terms)], device=inputs.student.device) / len(inputs)
    return head_pass(
        Projection(inputs.student, inputs.student_weight),
        Projection(inputs.teacher, inputs.teacher_weight) if target is None else target,
        inputs.labels,
        terms,
        shares,
        chunk=chunk,
    )[0]
