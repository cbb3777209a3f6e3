"""What every evaluation measures beside the terms, and a training log with its own step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.rowwise import Alone, Nll, RowTerm, Tempered
from llm_distill.losses.several import Sparse
from llm_distill.losses.softmax import log_softmax
from llm_distill.signals import Dense, Distribution, Factored, Whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.losses.blending import Combined


def measures(teacher: Distribution | None, vocabulary: int) -> Sequence[RowTerm]:
    """Row functions of `MEASURES`, in its order, at temperature 1.

    Args:
        teacher: Its distribution. A sparse one has no perplexity and no surest token: NaN; its KL
            is that of the tokens it tells. With None (other tokens than the student's) the KL is
            NaN as well.
        vocabulary: The student's.
    """
    absent = Alone(unknown)
    if teacher is None:
        return [Nll(), absent, absent, absent, Alone(entropy)]
    if isinstance(teacher, Sparse):
        return [Nll(), absent, Tempered(forward_kl), absent, Alone(entropy)]
    common = min(vocabulary, _tokens(teacher))
    agreement = partial(_agreement, common=common)
    return [Nll(), _teacher_nll, Tempered(forward_kl, common), agreement, Alone(entropy)]


def _tokens(teacher: Whole | Combined) -> int:
    """Columns of its logits."""
    if isinstance(teacher, Dense):
        return teacher.values.shape[-1]
    return len(teacher.head.weight) if isinstance(teacher, Factored) else teacher.vocabulary


def entropy(student: Tensor) -> Tensor:
    """Entropy of the student: `[n, V] -> [n]`, nats.

    >>> entropy(torch.zeros(1, 4))
    tensor([1.3863])
    """
    log_q = log_softmax(student)
    return -(log_q.exp() * log_q).sum(-1)


def unknown(student: Tensor) -> Tensor:
    """What a sparse teacher does not tell: `[n, V] -> [n]`, NaN."""
    return student.new_full(student.shape[:1], torch.nan)


def _teacher_nll(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels under the teacher: `any, [n, V], [n] -> [n]`."""
    del student
    return Nll()(cast("Tensor", teacher), None, labels)


def _agreement(student: Tensor, teacher: Tensor | None, labels: Tensor, *, common: int) -> Tensor:
    """1 where both models hold the same token for the likeliest: `[n, V] x2, any -> [n]`."""
    del labels
    theirs = cast("Tensor", teacher)[:, :common].argmax(-1)
    return (student[:, :common].argmax(-1) == theirs).to(student.dtype)


KL_OF_FEW = "KL on the tokens that the teacher told alone, nats per token"
"""What `eval_kl` is where `of_few_tokens`."""


def of_few_tokens(figures: Mapping[str, float]) -> bool:
    """Whether the KL of an evaluation is that on the tokens which a sparse teacher told.

    Such a teacher has no agreement. Its KL takes all other tokens for one, and is lower than that
    on all of them (higher for drawn tokens).

    >>> of_few_tokens({"eval_kl": 1.2}), of_few_tokens({"eval_kl": 1.6, "eval_agreement": 0.4})
    (True, False)
    """
    return "eval_kl" in figures and "eval_agreement" not in figures
