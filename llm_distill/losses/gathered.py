"""Terms without closed form on a block: differentiated by autograd, or on a sparse target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llm_distill.losses.pairs import Pair, Scratch, log_total
from llm_distill.losses.softmax import FLOOR, log_softmax

if TYPE_CHECKING:
    from llm_distill.losses.closed import Form
    from llm_distill.losses.rowwise import RowFunction, Tempered
    from llm_distill.losses.sparse import Counts, TopK


class Coarse(NamedTuple):
    """What is found on a sparse target; its gradient is `rest` x `scale`, with `kept` at `ids`.

    The one factor that is as wide as the vocabulary is left to whoever adds it up.

    Attributes:
        values: `[n]`.
        rest: `[n, V]`, a work buffer.
        scale: `[n, 1]`, or one for all rows; None where there is no gradient.
        ids: `[n, K]`.
        kept: `[n, K]`.
    """

    values: Tensor
    rest: Tensor
    scale: Tensor | float | None
    ids: Tensor
    kept: Tensor


def differentiate(
    term: RowFunction, student: Tensor, teacher: Tensor | None, labels: Tensor, *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """A term's values `[n]`, and the gradient of their sum `[n, V]`; None where there is none.

    A row whose gradient is no number has no number for its value, so that it is seen to be at
    fault: the square root of a forbidden token's probability has a value, and 0 inf for a gradient.
    """
    with torch.set_grad_enabled(wanted):
        leaf = student.detach().requires_grad_(wanted)
        values = term(leaf, teacher, labels)
        # A function of the labels or the teacher alone has no slope.
        slope = torch.autograd.grad(values.sum(), leaf)[0] if values.requires_grad else None
    values = values.detach()
    return values if slope is None else values + 0.0 * slope.sum(-1), slope


def coarse_score(
    term: Tempered,
    student: Tensor,
    target: TopK,
    labels: Tensor,
    scratch: Scratch,
    *,
    wanted: bool,
    form: Form | None = None,
) -> Coarse:
    """A divergence between K kept tokens and the rest, and its gradient.

    The student's tokens outside the K share the gradient of their sum, each by its probability:
    with u the coarse logits, `du_rest / dz_v = q_v / q_rest`, which is the softmax of the tail and
    known where q_rest underflows.

    Args:
        term: The divergence.
        student: Finite logits, `[n, V]`; a buffer meanwhile, and in the end as they were.
        target: Of these rows.
        labels: `[n]`.
        scratch: Work buffers.
        wanted: Whether the gradient is.
        form: The divergence's closed form, where it has one.
    """
    ids = target.ids
    kept = student.gather(-1, ids)
    # Below the floor, so that forbidden tokens of the tail still weigh more than none.
    student.scatter_(-1, ids, 2.0 * FLOOR)
    rest = torch.softmax(student, -1, out=scratch("q", *student.shape))
    total = log_total(student, rest)
    student.scatter_(-1, ids, kept)
    # Relative to one of them, so that an offset of all logits takes no digits.
    largest = kept.amax(-1, keepdim=True)
    kept, tail = kept - largest, (total.top - largest).add_(total.rest)
    if ids.shape[1] == student.shape[1]:  # softmax found equal tokens where there are none
        tail.fill_(FLOOR)
        rest.zero_()
    coarse, told = torch.cat([kept, tail], -1), target.targets().to(kept.dtype)
    if form is not None:
        values, slope = _by_form(form, term, coarse, told)
    else:
        own, places = replace(term, width=None), _coarse_labels(labels, ids)

        def normalised(s: Tensor, t: Tensor | None, where: Tensor) -> Tensor:
            """As the teacher's: a loss of one's own may not be blind to an offset."""
            return own(log_softmax(s), t, where)

        values, slope = differentiate(normalised, coarse, told, places, wanted=wanted)
    if slope is None:
        return Coarse(values, rest, None, ids, kept)
    return Coarse(values, rest, slope[:, -1:], ids, slope[:, :-1])


def _by_form(
    form: Form, term: Tempered, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A divergence of coarse logits in closed form: `[n, K + 1] x2 -> [n], [n, K + 1]`."""
    teacher, cool = term.target(student, teacher), 1.0 / term.temperature
    if cool != 1.0:
        student, teacher = student * cool, teacher * cool
    x = Pair(student, teacher, Scratch(student.numel(), student.dtype, student.device), sole=True)
    found = form(x)
    total = found.total[:, None] if isinstance(found.total, Tensor) else found.total
    slope = (found.a * found.factor).sub_(x.q * total).mul_(term.factor * cool)
    return found.value * term.factor, slope


def sampled_score(term: Tempered, student: Tensor, target: Counts, scratch: Scratch) -> Coarse:
    """Forward KL of sampled tokens from logits `[n, V]`, and its gradient q - counts / draws."""
    q = torch.softmax(student, -1, out=scratch("q", *student.shape))
    log_q = log_total(student, q).over(student.gather(-1, target.ids)).neg_()
    share = target.counts.to(q.dtype) / target.draws
    values = (torch.xlogy(share, share) - share * log_q).sum(-1)
    return Coarse(values * term.factor, q, term.factor, target.ids, share.mul_(-term.factor))


def _coarse_labels(labels: Tensor, ids: Tensor) -> Tensor:
    """Where the labels are among the kept tokens, K where they are not: `[n], [n, K] -> [n]`."""
    same = ids == labels[:, None]
    return torch.where(same.any(-1), same.long().argmax(-1), ids.shape[1])
