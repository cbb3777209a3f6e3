"""What teachers that are made of others share: their members' specs, and turns on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llm_distill.errors import InputError
from llm_distill.losses.blending import Blend, Part, Switch
from llm_distill.pieces import in_pieces
from llm_distill.signals import Dense, Distribution, Factored, Head, ModelSpec
from llm_distill.teachers.local import Local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llm_distill.rows import Batch
    from llm_distill.signals import Request, Signals
    from llm_distill.teachers.base import Source, Teacher


@dataclass(frozen=True)
class Composite(ABC):
    """A teacher that is made of others."""

    @property
    @abstractmethod
    def teachers(self) -> tuple[Teacher, ...]:
        """Those it is made of."""

    @abstractmethod
    def of(self, teachers: Sequence[Teacher]) -> Teacher:
        """The same of others, one for each that there is."""

    @abstractmethod
    def check_together(self, request: Request) -> None:
        """Refuse what cannot be asked of these members on any machine.

        Raises:
            InputError: Saying what to write.
        """

    @abstractmethod
    def form(self) -> str | None:
        """As `form_of`.

        Raises:
            InputError: For members whose answers cannot be combined.
        """


def has_device_map(teacher: object) -> bool:
    """Whether a teacher may lie on several devices of this process."""
    every = leaves(cast("Teacher", teacher))
    return any(isinstance(leaf, Local) and leaf.device_map is not None for leaf in every)


HOME = torch.device("cpu")
"""Where weights wait for their turn."""


def as_teachers(
    owner: str, given: Sequence[Teacher | PreTrainedModel | str]
) -> tuple[Teacher, ...]:
    """Members as specs; an id, a path or a loaded model is a `Local`.

    Raises:
        InputError: For less than two, or what is no teacher.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) < 2:
        raise InputError(f"{owner}: {given!r} are no several teachers; give a list of two or more")
    # To ask for the protocol would read their configs.
    return tuple(
        cast("Teacher", member) if "open" in dir(type(member)) else Local(cast("str", member))
        for member in given
    )


def leaves(teacher: Teacher) -> tuple[Teacher, ...]:
    """The single teachers that one is made of, itself for most.

    >>> [teacher.model for teacher in leaves(Local("an/id"))]
    ['an/id']
    """
    if not isinstance(teacher, Composite):
        return (teacher,)
    return tuple(leaf for member in teacher.teachers for leaf in leaves(member))


def common_spec(owner: str, specs: Sequence[ModelSpec]) -> ModelSpec:
    """Members as one model: the first, with the tokens and positions that all have."""
    names = ", ".join(spec.name for spec in specs)
    positions = [spec.positions for spec in specs if spec.positions]
    return replace(
        specs[0],
        name=f"{owner}({names})",
        vocabulary=min(spec.vocabulary for spec in specs),
        positions=min(positions, default=None),
    )


def part_of(said: Signals, owner: str) -> Part:
    """Whole logits of a member, as the pass over the head combines them.

    Raises:
        ValueError: For a member that gives a few tokens of each row.
    """
    found: Distribution = said.logits
    if isinstance(found, Factored):
        head = replace(found.head, weight=_kept(found.head.weight), bias=_kept(found.head.bias))
        return Factored(found.hidden, head).projection()
    if isinstance(found, Dense):
        return found.values
    if isinstance(found, Blend | Switch):
        return found
    raise ValueError(
        f"{owner} combines whole distributions, and its member {said.source} gives "
        f"{type(found).__name__} targets, a few tokens of each row; take members that give all, or "
        "in an Ensemble only such that do not (mode: mixture, no confidence)"
    )


def _kept(weight: Any) -> Any:  # noqa: ANN401  None stays None
    """A weight that stays where it is when its module moves on."""
    return None if weight is None else weight.detach()


class Turn:
    """A member whose weights are on the device only while it is asked.

    What it said stays there, the head of its logits too, until nobody needs it.

    Args:
        source: Opened on the device; its weights leave at once.
        device: Where it is asked.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self._source, self._device = source, device
        self.model, self.told = source.model, source.told
        self._move(HOME)

    def __call__(self, batch: Batch) -> Signals:
        """As the member."""
        self._move(self._device)
        try:
            return _staying(self._source(batch))
        finally:
            self._move(HOME)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing: one turn for each batch, so that what was said of others need not wait here."""

    def ask(self, request: Request) -> None:
        """As the member, which may try the request on a few tokens."""
        self._move(self._device)
        try:
            self._source.ask(request)
        finally:
            self._move(HOME)

    def close(self) -> None:
        """As the member."""
        self._source.close()
        self.model = None

    def _move(self, device: torch.device) -> None:
        """Its weights, if it holds any."""
        if self.model is not None:
            cast("nn.Module", self.model).to(device)


def _staying(said: Signals) -> Signals:
    """Signals that stay where they are when their model moves on, as its parameters do."""
    found = said.distribution
    if not isinstance(found, Factored):
        return said
    head = Head(
        _kept(found.head.weight), _kept(found.head.bias), found.head.scale, found.head.softcap
    )
    return replace(said, distribution=Factored(found.head.features(found.hidden), head))


def check_members(
    teacher: Composite, request: Request, refuse: Callable[[Request], None], *, turns: bool
) -> None:
    """What `check_together` is for those that are asked together.

    Args:
        teacher: Whose members they are.
        request: What is wanted of all of them.
        refuse: Raises `ValueError` for what they do not share.
        turns: Whether they take turns on the device.

    Raises:
        InputError: Saying what to write.
    """
    if turns:
        check_turns(teacher.teachers)
    if request.logits:
        teacher.form()
    try:
        refuse(request)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_turns(members: Sequence[Teacher]) -> None:
    """Refuse members whose weights cannot leave the device.

    Raises:
        InputError: Saying what to write.
    """
    for leaf in (leaf for member in members for leaf in leaves(member)):
        if not isinstance(leaf, Local):
            continue
        if leaf.device_map is not None or getattr(leaf.model, "hf_device_map", None) is not None:
            raise InputError(
                f"turns: {leaf.name} has a device_map, which keeps its weights where they are; "
                "leave one of the two out"
            )
        if leaf.shard not in ("auto", "replica"):
            raise _cannot_leave(leaf.name)
        if leaf.quantize is not None or _is_quantised(leaf):
            raise InputError(
                f"turns: {leaf.name} is quantised, and such weights stay on the device; leave "
                "turns out, or take the checkpoint in all its bits"
            )


def _is_quantised(teacher: Local) -> bool:
    """Whether the checkpoint, or the loaded model, is."""
    return getattr(teacher.config, "quantization_config", None) is not None


def _in_turns(member: Teacher) -> Teacher:
    """A member of which those it is made of take turns too."""
    return replace(cast("Any", member), turns=True) if isinstance(member, Composite) else member


def _cannot_leave(name: str) -> InputError:
    """For pieces of a model, which are where their process trains."""
    return InputError(
        f"turns: {name} lies in pieces on several processes, which stay on their devices; leave "
        "turns out, or write shard: replica"
    )


def opened(member: Teacher, request: Request, device: torch.device, *, turns: bool) -> Source:
    """A member at work, on the device or taking turns there; so do those that it is made of.

    Raises:
        InputError: If it cannot leave the device.
        ValueError: If it cannot give a signal.
    """
    if turns:
        check_turns([member])
        member = _in_turns(member)
    source = member.open(request, device)
    if not turns or isinstance(member, Composite):
        return source
    name, model = member.spec.name, source.model
    if in_pieces(model):
        source.close()
        raise _cannot_leave(name)
    if getattr(model, "hf_device_map", None) is not None:
        source.close()
        raise InputError(
            f"turns: {name} does not fit the device alone, and lies in memory or on disk in part; "
            "leave turns out, or write shard: replica to load it whole all the same"
        )
    return Turn(source, device)
