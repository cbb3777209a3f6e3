"""Sources that speak inside the distiller's forward, where the student's weights are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llm_distill.capture import Reader
from llm_distill.pieces import own_part
from llm_distill.signals import Factored, Request, Signals

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llm_distill.rows import Batch

Read = Callable[[Request], Signals]
"""The student's forward, with signals besides those that its terms ask for."""


class Within(nn.Module):
    """A teacher that is part of the distiller.

    Attributes:
        model: The weights it holds beside the student's.
        follows: Whether its weights follow the student's.
    """

    model: PreTrainedModel | None
    follows = False
    told: tuple[str, ...] = ()

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing to do: it speaks inside the forward, batch by batch."""

    def both(self, batch: Batch, read: Read) -> tuple[Signals, Signals]:
        """What student and teacher say; the teacher first, which leaves nothing behind."""
        said = cast("Signals", self(batch))
        return read(Request()), said

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for."""
        raise NotImplementedError

    def close(self) -> None:
        """Let the weights go."""
        self.model = None

    def train(self, mode: bool = True) -> Within:  # noqa: FBT001, FBT002  as torch has it
        """A teacher stays at rest: no dropout."""
        del mode
        super().train(mode=False)
        return self

    def learned(self) -> dict[str, Tensor]:
        """What a checkpoint has to know of it."""
        return {}

    def after_step(self, student: nn.Module) -> None:
        """Hear of a finished optimizer step."""


class Copy(Within):
    """A copy of the student, frozen or following.

    Args:
        model: The copy.
        request: What is read from it.
        name: For messages.
        decay: Share of it that stays after each step; None: it does not move.
    """

    def __init__(
        self, model: nn.Module, request: Request, name: str, *, decay: float | None = None
    ) -> None:
        super().__init__()
        self._trained = [n for n, p in model.named_parameters() if p.requires_grad]
        self.model = cast("PreTrainedModel", model.eval().requires_grad_(requires_grad=False))
        self.follows = decay is not None
        self._decay, self._name = decay, name
        self.ask(request)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Signals:
        """Signals of one batch."""
        bring(cast("nn.Module", self.model), batch)
        said = self._reader.read(batch)
        self._reader.release()
        return said

    def ask(self, request: Request) -> None:
        """From now on give these signals only."""
        if self.model is None:
            raise RuntimeError("this teacher was closed; open it again")
        self._reader = Reader(self.model, request, f"teacher {self._name}")

    def learned(self) -> dict[str, Tensor]:
        """The weights that moved, under their names in the student."""
        own = dict(cast("nn.Module", self.model).named_parameters())
        return {name: own[name] for name in self._trained} if self.follows else {}

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        """Move towards the student, each rank the shards that it has."""
        if self._decay is None:
            return
        theirs = dict(student.named_parameters())
        for name, mean in self.learned().items():
            own_part(mean).lerp_(own_part(theirs[name]), 1.0 - self._decay)


class Shared(Within):
    """The student's own weights, read once more at rest.

    Args:
        model: The student; it is no part of this module.
        request: All that is ever read from it.
        name: For messages.
        bare: Whether its adapters are left out.

    Raises:
        ValueError: For attention, whose modules the student's own reading occupies.
    """

    def __init__(self, model: PreTrainedModel, request: Request, name: str, *, bare: bool) -> None:
        super().__init__()
        refuse_attention(request, name)
        self.model = None
        self._bare = bare
        self._student = (model,)  # in a tuple, so that it is no submodule
        self._reader = Reader(model, request, f"teacher {name}")

    @torch.no_grad()
    def forward(self, batch: Batch) -> Signals:
        """Signals of one batch."""
        (model,) = self._student
        bring(model, batch)
        bare = without_adapters(cast("PeftModel", model)) if self._bare else nullcontext()
        with at_rest(model), bare:
            return self._reader.read(batch)

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for."""
        # No new reader: it would let the student's taps forget their batch.
        self._reader.request = request


class Deeper(Shared):
    """What the student's own deeper layers say, of the forward that is trained."""

    def both(self, batch: Batch, read: Read) -> tuple[Signals, Signals]:
        """What the student says, and the same without gradients."""
        del batch
        request = self._reader.request
        student = read(request)
        return student, detached(student, request)


def refuse_attention(request: Request, name: str) -> None:
    """Refuse attention of weights that are the student's.

    Raises:
        ValueError: Naming the blocks.
    """
    if request.heads:
        raise ValueError(
            f"{name} gives logits and hidden states, and attention of blocks "
            f"{sorted(request.heads)} is asked for, which the student's own reading occupies; "
            "use Logits and HiddenStates with it, or the teacher BornAgain"
        )


def bring(model: nn.Module, batch: Batch) -> None:
    """Move a model to the batch, before a Trainer does (calibration); it stays if it is there."""
    device, weight = batch.supervised.index.device, next(model.parameters())
    if weight.device != device:
        model.to(device)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards each of its modules as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[None]:
    """A model without its adapters, and afterwards with them.

    PEFT freezes them meanwhile; here they stay as they are, since FSDP2 remembers of the first
    forward whether what it gathers has a gradient.
    """
    trained = {name: p.requires_grad for name, p in model.named_parameters()}

    def restore() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])

    with model.disable_adapter():
        restore()
        yield
    restore()


def settled(distiller: nn.Module) -> None:
    """Give gathered weights back to their ranks: an evaluation leaves FSDP2's root as it was."""
    for module in distiller.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def detached(said: Signals, request: Request) -> Signals:
    """What was asked for of the signals of a model that is trained, without gradients."""
    distribution = said.distribution if request.logits else None
    if isinstance(distribution, Factored):
        head = distribution.head
        bias = None if head.bias is None else head.bias.detach()
        distribution = Factored(
            distribution.hidden.detach(), replace(head, weight=head.weight.detach(), bias=bias)
        )
    states = {layer: said.states[layer].detach() for layer in request.hidden}
    return Signals(said.source, distribution, states)
