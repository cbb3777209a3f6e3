"""Several teachers at once: one distribution of theirs, and the layers of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, get_args

from transformers import PreTrainedModel

from llm_distill.errors import InputError
from llm_distill.losses.blending import Blend, Confidence, Mode
from llm_distill.losses.several import Several, Sparse
from llm_distill.signals import ModelSpec, Request, Signals
from llm_distill.teachers.base import Source, Teacher
from llm_distill.teachers.forms import UNKNOWN, forms
from llm_distill.teachers.members import (
    Composite,
    as_teachers,
    check_members,
    common_spec,
    opened,
    part_of,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from llm_distill.rows import Batch
    from llm_distill.signals import Distribution


@dataclass(frozen=True)
class Ensemble(Composite):
    """Several teachers of one tokenizer, heard together.

    Objectives on logits see one distribution; those on layers name whose they want (`member: 1`),
    each with a map of its own.

    Attributes:
        members: Teachers of any kind that is not the student itself; an id, a path or a loaded
            model is a `Local`.
        weights: Of the members, scaled to sum to 1; by default all alike.
        mode: `mixture`, the mean of the probabilities, whose forward KL has the gradient of the
            weighted sum of the members' KLs; or `logit_mean`, the mean of the logits, which keeps
            what all hold likely. At a temperature T the mixture is that of the members at T.
        confidence: Multiply each member's weight in each row by how far it is to be trusted there:
            `label`, by its loss on the label next to the others'; `entropy`, by exp(-entropy).
        turns: Keep members in the memory of the CPU, each on the device only while it is asked.

    Where vocabularies are padded to different sizes, all are cut to the common tokens. Members that
    tell a few tokens of each row (all of them, or none) have no mixture: the loss is the weighted
    sum of the losses to each, which under forward KL has the gradient of one.

    Raises:
        InputError: For less than two members, weights that do not fit them, or unknown words.

    Source: You et al. 2017, Learning from Multiple Teacher Networks (mixture); Zhang, Chen, Wang
    2022 (CA-MKD), arXiv 2201.00007 (confidence).
    """

    members: Sequence[Teacher | PreTrainedModel | str]
    weights: Sequence[float] | None = None
    mode: Mode = "mixture"
    confidence: Confidence | None = None
    turns: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be combined."""
        object.__setattr__(self, "members", as_teachers("Ensemble", self.members))
        if self.mode not in get_args(Mode):
            raise InputError(f"Ensemble: mode is {self.mode!r}; write mixture or logit_mean")
        if self.confidence is not None and self.confidence not in get_args(Confidence):
            raise InputError(
                f"Ensemble: confidence is {self.confidence!r}; write label or entropy, or leave it "
                "out"
            )
        if self.weights is not None:
            object.__setattr__(self, "weights", _checked(self.weights, len(self.members)))

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The members, as specs."""
        return as_teachers("Ensemble", self.members)

    def of(self, teachers: Sequence[Teacher]) -> Ensemble:
        """The same of other members."""
        return replace(self, members=tuple(teachers))

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, which sum to 1."""
        given = self.weights if self.weights is not None else [1.0] * len(self.members)
        scaled = [weight / max(given) for weight in given]  # else the sum may be no number
        return tuple(weight / math.fsum(scaled) for weight in scaled)

    @property
    def config(self) -> PreTrainedConfig:
        """The first member's."""
        return self.teachers[0].config

    @property
    def spec(self) -> ModelSpec:
        """The first member's, with the tokens and positions that all have."""
        specs = tuple(member.spec for member in self.teachers)
        return replace(common_spec("Ensemble", specs), members=specs)

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """The first one that a member has; that all are one is checked with the student's."""
        found = (member.find_tokenizer() for member in self.teachers)
        return next((tokenizer for tokenizer in found if tokenizer is not None), None)

    def check(self, request: Request, device: torch.device) -> None:
        """Refuse what a member refuses, what cannot be combined, and layers of nobody.

        Raises:
            InputError: As the members.
        """
        self.check_together(request)
        for k, member in enumerate(self.teachers):
            member.check(_share_of(request, k), device)

    def check_together(self, request: Request) -> None:
        """Refuse what cannot be combined, what cannot take turns, and layers of nobody.

        Raises:
            InputError: Saying what to write.
        """

        def refuse(asked: Request) -> None:
            _refuse_nobody(asked, self.spec.name)

        check_members(self, request, refuse, turns=self.turns)

    def form(self) -> str | None:
        """Which few tokens of each row are told, if not all.

        Raises:
            InputError: For members whose answers cannot be combined.
        """
        found = forms("Ensemble", self.teachers)
        if None in found or UNKNOWN in found:
            return UNKNOWN if UNKNOWN in found else None
        if self.mode != "mixture" or self.confidence is not None:
            what = f"mode: {self.mode}" if self.confidence is None else "confidence"
            raise InputError(
                f"Ensemble: {what} combines whole distributions, and {self.teachers[0].spec.name} "
                f"tells {found[0]} of each row; write mode: mixture without confidence, or take "
                "members that tell all tokens"
            )
        return f"several ({'; '.join(map(str, found))})"

    def open(self, request: Request, device: torch.device) -> EnsembleSource:
        """Open all members, one after the other.

        Raises:
            ValueError: If layers are asked for and not whose, or a member cannot give them.
        """
        _refuse_nobody(request, self.spec.name)
        asked = [_share_of(request, k) for k in range(len(self.members))]
        sources = [
            opened(member, own, device, turns=self.turns)
            for member, own in zip(self.teachers, asked, strict=True)
        ]
        return EnsembleSource(self, sources, request)


class EnsembleSource:
    """Several teachers at work.

    Args:
        spec: How they are combined.
        sources: Of the members.
        request: What is wanted of all of them.
    """

    model = None  # the weights are the members'

    def __init__(self, spec: Ensemble, sources: Sequence[Source], request: Request) -> None:
        self._spec, self._name = spec, f"teacher {spec.spec.name}"
        self.sources = tuple(sources)
        self._request = request

    @property
    def told(self) -> tuple[str, ...]:
        """The members'."""
        return tuple(line for source in self.sources for line in source.told)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """As the members that somebody listens to."""
        for k, source in enumerate(self.sources):
            if _share_of(self._request, k) != Request():
                source.prepare(batches)

    def __call__(self, batch: Batch) -> Signals:
        """All members, one after the other; those that nobody listens to do not run."""
        heard = []
        for k, source in enumerate(self.sources):
            silent = _share_of(self._request, k) == Request()
            heard.append(Signals(f"member {k} of {self._name}") if silent else source(batch))
        blend: Distribution | None = None
        if self._request.logits:
            blend = self._blend(heard)
        return Signals(self._name, blend, members=tuple(heard))

    def _blend(self, heard: Sequence[Signals]) -> Distribution:
        """One distribution of all members."""
        spec = self._spec
        few = [said.logits for said in heard if isinstance(said.logits, Sparse)]
        if len(few) == len(heard) and spec.mode == "mixture" and spec.confidence is None:
            return Several.of(few, spec.shares)
        parts = tuple(part_of(said, self._name) for said in heard)
        return Blend(parts, spec.shares, spec.mode, spec.confidence)

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for."""
        _refuse_nobody(request, self._name)
        for k, source in enumerate(self.sources):
            own = _share_of(request, k)
            if own not in (Request(), _share_of(self._request, k)):
                source.ask(own)
        self._request = request

    def close(self) -> None:
        """Close all members."""
        for source in self.sources:
            source.close()


def _share_of(request: Request, member: int) -> Request:
    """What one member has to give of what all are asked for."""
    return Request(logits=request.logits) | request.member(member)


def _refuse_nobody(request: Request, name: str) -> None:
    """Refuse layers of nobody in particular.

    Raises:
        ValueError: Naming them.
    """
    layers = sorted(request.hidden | request.heads)
    if layers:
        raise ValueError(
            f"{name} has several teachers, and layers {layers} are asked for without saying whose; "
            "write member: 0 in the objective, or another number"
        )


def _checked(weights: Sequence[float], members: int) -> tuple[float, ...]:
    """Weights that fit the members.

    Raises:
        InputError: For no list of numbers, another number of them, one that is negative, or none
            above 0.
    """
    listed = isinstance(weights, Sequence) and not isinstance(weights, str)
    if not listed or not all(isinstance(w, Real) and not isinstance(w, bool) for w in weights):
        raise InputError(
            f"Ensemble: weights are {weights!r}; write a list of numbers, one for each member"
        )
    try:
        given = tuple(float(weight) for weight in weights)
    except OverflowError:
        raise InputError("Ensemble: weights are too large; write smaller ones") from None
    if len(given) != members:
        raise InputError(
            f"Ensemble: {len(given)} weights for {members} members; write one for each"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
        raise InputError(
            f"Ensemble: weights are {list(given)}; write numbers >= 0, one of them above 0"
        )
    return given
