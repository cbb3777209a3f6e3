"""Which head passes the Triton path can take, and how: one divergence, the labels, or both.

Everything else, such as a user's own function, two divergences or a sparse teacher, goes the way of
`scoring`; so do the measures of a pass that is logged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_distill.losses import kernels
from llm_distill.losses.blending import Blend, Switch
from llm_distill.losses.planning import Group, Plan
from llm_distill.losses.rowwise import Tempered
from llm_distill.losses.scoring import Job, Side, Target, score

SWITCH = "LLM_DISTILL_TRITON"
"""Environment variable; 0 keeps to PyTorch's own operations."""


@dataclass(frozen=True)
class Launch:
    """A pass on the Triton path.

    Attributes:
        spec: What is computed.
        place: Of the divergence; None for the labels alone.
        factor: On its value.
        labels: Places of the terms on the labels.
        measured: What is measured besides, with PyTorch's operations; None for nothing.
    """

    spec: kernels.Spec
    place: int | None
    factor: float
    labels: tuple[int, ...]
    measured: Job | None

    def score(self, z: Tensor, target: Target, labels: Tensor, values: Tensor) -> None:
        """As `scoring.score`."""
        if self.measured is not None:
            score(z, target, labels, values, self.measured)
        teacher = None
        if self.place is not None and isinstance(target, Blend | Switch):
            # Blocks of the vocabulary would each need the whole of every teacher's softmax.
            width = min(z.shape[1], target.vocabulary)
            teacher = target.logits(width, self.spec.temperature, labels)
        elif self.place is not None and isinstance(target, Tensor):
            teacher = target
        value, nll = kernels.score(z, teacher, labels, self.spec)
        if self.place is not None:
            values[self.place] = value * self.factor
        for place in self.labels:
            values[place] = value if nll is None else nll


def on_chip(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton path is to be taken: on a GPU with Triton, unless it is switched off."""
    wanted = os.environ.get(SWITCH, "1") != "0" and dtype in kernels.DTYPES
    return wanted and device.type == "cuda" and kernels.usable(device)


def launch(job: Job, shares: Tensor, vocabulary: int) -> Launch | None:
    """How the Triton path computes a job; None if it cannot.

    Args:
        job: For the PyTorch path.
        shares: `[K]`, factor on each term's gradient, on the device.
        vocabulary: Tokens both models have.
    """
    trained, measured = _split(job.plan, len(shares))
    labels = tuple(place for group in trained.groups for place in group.labels)
    members = [(member.place, member.term) for group in trained.groups for member in group.members]
    members += [(place, term) for place, term in trained.free if isinstance(term, Tempered)]
    others = trained.coarse or any(not isinstance(term, Tempered) for _, term in trained.free)
    if others or len(members) > 1 or not (members or labels):
        return None
    nll_share = torch.stack([shares[k] for k in labels]).sum() if labels else None
    if not members:
        spec = kernels.Spec(None, shares.new_zeros(()), nll_share=nll_share)
        place, term = None, None
    else:
        place, term = members[0]
        form = kernels.supports(term.loss)
        if form is None:
            return None
        spec = kernels.Spec(
            form=form,
            share=shares[place] * term.factor,
            width=min(vocabulary, term.width or vocabulary),
            temperature=term.temperature,
            teacher=job.teacher.finish,
            nll_share=nll_share,
            mix=None if term.mix is None else term.mix.to(shares.dtype),
        )
    spec = replace(spec, student=job.student.finish, grad=job.wanted)
    return Launch(spec, place, 1.0 if term is None else term.factor, labels, _rest(job, measured))


def _split(plan: Plan, counted: int) -> tuple[Plan, Plan]:
    """Terms that are trained, and those that are measured."""

    def part(*, trained: bool) -> Plan:
        def mine(place: int) -> bool:
            return (place < counted) == trained

        groups: list[Group] = []
        for group in plan.groups:
            members = tuple(member for member in group.members if mine(member.place))
            labels = tuple(place for place in group.labels if mine(place))
            if members or labels:
                groups.append(replace(group, members=members, labels=labels))
        free = tuple(entry for entry in plan.free if mine(entry[0]))
        return Plan(tuple(groups), free, tuple(entry for entry in plan.coarse if mine(entry[0])))

    return part(trained=True), part(trained=False)


def _rest(job: Job, plan: Plan) -> Job | None:
    """A job that only measures, and leaves the logits as they are."""
    if plan == Plan((), ()):
        return None
    student: Side = replace(job.student, owned=False)
    teacher: Side = replace(job.teacher, owned=False)
    return replace(job, plan=plan, shares=(), wanted=False, student=student, teacher=teacher)
