"""Values and gradient of all row-wise terms for one chunk of logits, block by block.

Blocks are a few rows, so that the passes over them stay in the processor's cache. Terms that look
at the same two distributions share their softmax; a term without closed form is differentiated by
autograd on its block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llm_distill.losses.blending import Blend, Combined, Switch
from llm_distill.losses.closed import Form
from llm_distill.losses.gathered import Coarse, coarse_score, differentiate, sampled_score
from llm_distill.losses.pairs import Pair, Scratch, Total, log_total
from llm_distill.losses.planning import Group, Member, Plan
from llm_distill.losses.projection import Finish
from llm_distill.losses.rowwise import Tempered
from llm_distill.losses.several import Several, Sparse
from llm_distill.losses.sparse import Counts, TopK

if TYPE_CHECKING:
    from llm_distill.losses.rowwise import RowTerm

INFINITE = 1e8
"""Nats per row from which a value counts as infinite: a logit of -inf stands for -1e30."""

Target = Tensor | Combined | Sparse | None
"""What the teacher says of a chunk: its product `[n, V']`, those of several, a sparse target, or
nothing."""


@dataclass(frozen=True)
class Side:
    """How one model's logits come.

    Attributes:
        finish: What follows the product.
        owned: Whether the chunk may be overwritten.
        finite: Whether no logit is -inf.
    """

    finish: Finish = field(default_factory=Finish)
    owned: bool = False
    finite: bool = False


@dataclass(frozen=True)
class Job:
    """What is the same for all chunks of a pass.

    Attributes:
        plan: Of the terms.
        shares: Factor on each term's gradient: numbers where the host knows them. Terms behind the
            last one are measured only.
        student: Its logits.
        teacher: Its logits.
        wanted: Whether the gradient is.
        scratch: Work buffers.
        rows: Per block.
        forms: Closed forms of divergences on a sparse target, by their places.
    """

    plan: Plan
    shares: Sequence[Tensor | float]
    student: Side
    teacher: Side
    wanted: bool
    scratch: Scratch
    rows: int
    forms: Mapping[int, Form | None] = field(default_factory=dict)

    @cached_property
    def direct(self) -> bool:
        """Whether the gradient can grow in the place of the logits: one look at them is enough."""
        plan = self.plan
        looks = len(plan.free) + len(plan.coarse)
        looks += sum(max(1, len(group.members)) for group in plan.groups)
        return looks == 1 and self.student.finish.softcap is None


_SLICED = (Blend, Switch, TopK, Counts, Several)
"""Targets that hand out rows themselves."""


def score(z: Tensor, target: Target, labels: Tensor, values: Tensor, job: Job) -> None:
    """Values of a chunk, and its gradient in the place of its logits.

    Args:
        z: `[n, V]`, the student's product; overwritten, by the gradient of the weighted sum of the
            values where one is wanted. Rows at fault (`faulty`) get 0.
        target: What the teacher says of these rows.
        labels: `[n]`.
        values: `[K, n]`; is filled.
        job: Everything else.
    """
    parts = z.split(job.rows), labels.split(job.rows), values.split(job.rows, 1)
    for k, part in enumerate(zip(*parts, strict=True)):
        rows = slice(k * job.rows, (k + 1) * job.rows)
        said = target.rows(rows) if isinstance(target, _SLICED) else target
        _Block(*part, said[rows] if isinstance(said, Tensor) else said, job).run()
    bad = faulty(values[: len(job.shares)])
    elsewhere = bad.device.type != "cpu"  # to ask a GPU would be to wait for it
    if job.wanted and (elsewhere or bad.any()):
        z.masked_fill_(bad[:, None], 0.0)


def faulty(values: Tensor) -> Tensor:
    """Rows of which a value is no number, or infinite: `[K, N] -> [N]`."""
    return (values.abs() < INFINITE).all(0).logical_not()


def cut(logits: Tensor, width: int) -> Tensor:
    """The first tokens; the same tensor where these are all."""
    return logits if logits.shape[1] == width else logits[:, :width]


class _Block:
    """A few rows: finished logits of both models, and the gradient that grows term by term."""

    def __init__(self, z: Tensor, labels: Tensor, values: Tensor, target: Target, job: Job) -> None:
        self.z, self.target, self.labels, self.values, self.job = z, target, labels, values, job
        self.s = self._finished(z, job.student, "s")
        self.t = z
        if isinstance(target, Tensor):
            self.t = self._finished(target, job.teacher, "t")
        one_look = job.direct and not isinstance(target, Several)  # each of which looks anew
        direct = one_look and z.dtype == job.scratch.dtype
        self.slope = z if direct else self._buffer("slope", z.shape[1])
        self.empty = True

    def run(self) -> None:
        """All terms; then the gradient takes the place of the logits."""
        plan, last = self.job.plan, len(self.job.plan.groups) - 1
        for place, term in plan.free:
            given = (self.s, self._told(term), self.labels)
            self._take(place, *differentiate(term, *given, wanted=self._trained(place)))
        for place, divergence in plan.coarse:
            self._coarse(place, divergence)
        for k, group in enumerate(plan.groups):
            self._closed(group, last=k == last)
        if self.job.wanted:
            self._hand_over()

    def _told(self, term: RowTerm) -> Tensor | None:
        """What the teacher says, as a term is to see it: whole logits, or nothing."""
        if isinstance(self.target, Blend | Switch):
            width = min(self.z.shape[1], self.target.vocabulary)
            temperature = term.temperature if isinstance(term, Tempered) else 1.0
            return self.target.logits(width, temperature, self.labels)
        return self.t if isinstance(self.target, Tensor) else None

    def _finished(self, raw: Tensor, side: Side, name: str) -> Tensor:
        """Logits in fp32 or better, in the place of the product where its dtype allows."""
        fits = side.owned and raw.dtype == self.job.scratch.dtype
        out = raw if fits else self._buffer(name, raw.shape[1])
        return side.finish.into(raw, out, clamp=not side.finite)

    def _buffer(self, name: str, width: int) -> Tensor:
        """A work buffer."""
        return self.job.scratch(name, len(self.z), width)

    def _take(self, place: int, values: Tensor, slope: Tensor | None) -> None:
        """Values and gradient of a whole term."""
        self.values[place] = values
        if slope is not None:
            self._add(slope, self._share(place))

    def _add(self, slope: Tensor, weight: Tensor | float) -> None:
        """Add to the gradient of the first tokens: `[n, W]`, times a number, `[]` or `[n, 1]`."""
        if not self.job.wanted or (isinstance(weight, float) and weight == 0.0):
            return
        width = slope.shape[1]
        grown = cut(self.slope, width)
        if self.empty:
            torch.mul(slope, weight, out=grown)
            if grown is not self.slope:
                self.slope[:, width:].zero_()
            self.empty = False
        elif isinstance(weight, Tensor):
            grown.addcmul_(slope, weight)
        else:
            grown.add_(slope, alpha=weight)

    def _hand_over(self) -> None:
        """The gradient of the product, in its place and dtype."""
        if self.empty:
            self.slope.zero_()
        self.job.student.finish.chain_(self.slope, self.s)
        if self.slope is not self.z:
            self.z.copy_(self.slope)

    def _share(self, place: int) -> Tensor | float:
        """Factor of a term's gradient; 0 for those that are measured only."""
        return self.job.shares[place] if place < len(self.job.shares) else 0.0

    def _trained(self, place: int) -> bool:
        """Whether a term has a gradient at all."""
        return self.job.wanted and place < len(self.job.shares)

    def _coarse(self, place: int, term: Tempered) -> None:
        """A divergence on a sparse target; on several, the weighted sum of those on each."""
        parts: Iterable[tuple[Target, float]] = ((self.target, 1.0),)
        if isinstance(self.target, Several):
            parts = zip(self.target.parts, self.target.weights, strict=True)
        self.values[place] = 0.0
        for part, weight in parts:
            found = self._coarse_one(place, term, part)
            self.values[place].add_(found.values, alpha=weight)
            self._add_coarse(found, self._share(place) * weight)

    def _add_coarse(self, found: Coarse, weight: Tensor | float) -> None:
        """Add a gradient that is in two parts."""
        nothing = isinstance(weight, float) and weight == 0.0
        if found.scale is None or nothing or not self.job.wanted:
            return
        self._add(found.rest, found.scale * weight)
        self.slope.scatter_add_(-1, found.ids, found.kept * weight)

    def _coarse_one(self, place: int, term: Tempered, target: Target) -> Coarse:
        """A divergence on the sparse target of one teacher."""
        student = cut(self.s, min(term.width or self.s.shape[1], self.s.shape[1]))
        if isinstance(target, Counts):
            return sampled_score(term, student, target, self.job.scratch)
        if not isinstance(target, TopK):
            raise TypeError(f"{target} is no sparse target")
        given = (student, target, self.labels, self.job.scratch)
        form = self.job.forms.get(place)
        return coarse_score(term, *given, wanted=self._trained(place), form=form)

    def _closed(self, group: Group, *, last: bool) -> None:
        """Terms in closed form and on the labels, on one softmax of the student."""
        share = sum(self._share(place) for place in group.labels)
        if not group.members:
            q = torch.softmax(self.s, -1, out=self._buffer("q", group.width))
            self._label(group, log_total(self.s, q))
            self._add(q, share)
        else:
            pair = self._pair(group, last=last)
            if group.labels:
                self._label(group, pair.student_total)
            taken = [self._form(member, pair) for member in group.members]
            self._add(pair.q, share - sum(taken))
        if group.labels and self.job.wanted:
            picked = self.labels[:, None]
            drop = self.slope.new_zeros(picked.shape).sub_(share)
            self.slope.scatter_add_(-1, picked, drop)

    def _form(self, member: Member, pair: Pair) -> Tensor | float:
        """One divergence; what it takes from the coefficient of q: `[n, 1]`, or a number."""
        term, found = member.term, member.form(pair)
        value = found.value if term.factor == 1.0 else found.value * term.factor
        self.values[member.place] = value
        weight = self._share(member.place) * (term.factor / term.temperature)
        if isinstance(weight, float) and weight == 0.0:
            return 0.0  # what is only measured may be no number
        self._add(found.a, weight * found.factor)
        return weight * (found.total[:, None] if isinstance(found.total, Tensor) else found.total)

    def _label(self, group: Group, total: Total) -> None:
        """Values of the terms on the labels."""
        nll = total.over(self.s.gather(-1, self.labels[:, None]))
        for place in group.labels:
            self.values[place] = nll[:, 0]

    def _pair(self, group: Group, *, last: bool) -> Pair:
        """The two distributions of a group, in the place of the logits if nobody needs them."""
        term = group.members[0].term
        told = cast("Tensor", self._told(term))  # without one there would be no such group
        s, t = cut(self.s, group.width), cut(told, group.width)
        into_s, into_t = s, t
        if not last or self.job.student.finish.softcap is not None:
            into_s, into_t = self._buffer("s2", group.width), self._buffer("t2", group.width)
        if term.mix is not None:
            t = torch.lerp(s, t, term.mix.to(s.dtype), out=into_t)
        cool = 1.0 / term.temperature
        s = s if s is into_s and cool == 1.0 else torch.mul(s, cool, out=into_s)
        t = t if t is into_t and cool == 1.0 else torch.mul(t, cool, out=into_t)
        return Pair(s, t, self.job.scratch, sole=len(group.members) == 1)
