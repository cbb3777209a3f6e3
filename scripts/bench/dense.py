"""The dense way: all logits of both models at once, and the right answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm_distill.losses.rowwise import takes_labels
from scripts.bench.arms import Answer
from scripts.bench.inputs import CE_WEIGHT, Inputs, Loss

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 128
"""Rows at once where the answer is computed in float64."""


def naive_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What a user writes in two lines: `[N, V], [N, V] -> [N]`."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def values(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row from fp32 logits, as GKD writes it where GKD has it: `[N]`."""
    if loss.beta is None:
        given = {"labels": labels} if takes_labels(loss.function) else {}
        return loss.function(student, teacher, **given)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if loss.beta in (0.0, 1.0):
        return _kl(log_p, log_q) if loss.beta == 0.0 else _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(loss.beta), log_q + math.log1p(-loss.beta))
    return loss.beta * _kl(log_p, log_m) + (1 - loss.beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def dense(inputs: Inputs, loss: Loss, *, ce: float = 0.0) -> Tensor:
    """The mean loss through autograd, softmax in fp32 or better."""
    student = _wide(inputs.student @ inputs.student_weight.T)
    with torch.no_grad():
        teacher = _wide(inputs.teacher @ inputs.teacher_weight.T)
    summed = values(loss, student, teacher, inputs.labels).sum()
    if ce:
        summed = summed + ce * F.cross_entropy(student, inputs.labels, reduction="sum")
    return summed / len(inputs)


def dense_checkpointed(inputs: Inputs, loss: Loss) -> Tensor:
    """The same, computed a second time in the backward."""
    result: Tensor = checkpoint(
        lambda h, w: dense(replace(inputs, student=h, student_weight=w), loss),
        inputs.student,
        inputs.student_weight,
        use_reentrant=False,
    )
    return result


def answer(inputs: Inputs, loss: Loss, *, mixed: bool, reference: str) -> Answer:
    """Loss and gradients of the hidden states and of the head.

    Args:
        inputs: Not touched.
        loss: The divergence.
        mixed: Whether cross-entropy is mixed in.
        reference: `float32`: through the logits of the inputs' dtype; `float64`: all in float64.
    """
    value, h, w = 0.0, [], torch.zeros((), device=inputs.student.device)
    for part in _parts(inputs, reference):
        leaves = part.student, part.student_weight
        share = dense(part, loss, ce=CE_WEIGHT if mixed else 0.0) * (len(part) / len(inputs))
        of_h, of_w = torch.autograd.grad(share, leaves)
        value, w = value + float(share.detach()), w + of_w
        h.append(of_h)
    return Answer(value, {"hidden": torch.cat(h), "head": w})


def _parts(inputs: Inputs, reference: str) -> Iterable[Inputs]:
    """All rows, or float64 copies of some."""
    if reference != "float64":
        yield inputs
        return
    weights = inputs.student_weight.detach().double(), inputs.teacher_weight.double()
    for start in range(0, len(inputs), BLOCK):
        rows = slice(start, start + BLOCK)
        yield Inputs(
            inputs.student.detach()[rows].double().requires_grad_(),
            weights[0].requires_grad_(),
            inputs.teacher[rows].double(),
            weights[1],
            inputs.labels[rows],
        )


def _wide(logits: Tensor) -> Tensor:
    """In fp32, or float64 where they were."""
    return logits if logits.dtype == torch.float64 else logits.float()
