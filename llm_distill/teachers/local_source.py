"""A frozen model at work."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_distill.capture import Reader
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.pieces import in_pieces
from llm_distill.rows import Batch
from llm_distill.signals import Dense, Distribution, Factored, Head, Request, Signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from llm_distill.attention import Heads
    from llm_distill.placement import Spread


Known = tuple[Batch, Signals, int]
"""A batch, kept so that its id stays its own; what was said of it; how often that is wanted."""


class LocalSource:
    """A frozen model at work.

    Args:
        model: Set to evaluation mode and frozen here.
        request: What is read from it.
        name: For messages.
        device: Where the signals are wanted.
        spread: The processes that compute its layers together, where there are several.
        told: Where it lies.
        ahead: Whether it reads the micro-batches of a step at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: Request,
        name: str,
        device: torch.device,
        *,
        spread: Spread | None = None,
        told: tuple[str, ...] = (),
        ahead: bool = False,
    ) -> None:
        self.model: PreTrainedModel | None = model.eval().requires_grad_(requires_grad=False)
        self.device, self.told, self._name, self._spread = device, told, name, spread
        self._reader: Reader | None = None
        self._ahead, self._known = ahead, dict[int, Known]()
        # Where it was put and nothing brings its inputs there, as a device map of one place has it.
        hooked = getattr(model, "hf_device_map", None) is not None or in_pieces(model)
        self._place = device if hooked else model.device
        self.ask(request)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signals:
        """Signals of one batch, on the device of the training."""
        known = self._known.get(id(batch))
        if known is None:
            return self._read([batch])[0]
        _, signals, left = known
        self._known[id(batch)] = batch, signals, left - 1
        if left == 1:
            del self._known[id(batch)]
        return signals

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch]) -> None:
        """Read the micro-batches of the coming step, where that was asked for."""
        if not self._ahead:
            return
        self._known.clear()
        # A batch that fills a step up may stand in it several times.
        times = Counter(map(id, batches))
        single = list({id(batch): batch for batch in batches}.values())
        for batch, signals in zip(single, self._read(single), strict=True):
            self._known[id(batch)] = batch, signals, times[id(batch)]

    def _read(self, batches: Sequence[Batch]) -> list[Signals]:
        """Signals of some batches, in one forward."""
        if self._reader is None:
            raise RuntimeError("this teacher was closed; open it again")
        if self._place != self.device:
            batches = [batch.to(self._place) for batch in batches]
        found = self._reader.read_all(batches)
        self._reader.release()
        return [moved(signals, self.device) for signals in found]

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for."""
        self._known.clear()
        if self.model is None:
            raise RuntimeError("this teacher was closed; open it again")
        self._reader = Reader(self.model, request, f"teacher {self._name}", spread=self._spread)

    def close(self) -> None:
        """Let the weights go; twice is once."""
        self.model = self._reader = None
        self._known.clear()


def moved(signals: Signals, device: torch.device) -> Signals:
    """The same signals on a device; no copy where they are there already."""

    def to(tensor: Tensor | None) -> Any:  # noqa: ANN401  None stays None
        return None if tensor is None else tensor.to(device)

    def distribution(value: Distribution | None) -> Distribution | None:
        if value is None:
            return None
        if isinstance(value, Dense):
            return Dense(to(value.values))
        if isinstance(value, TopK | Counts):
            return value.to(device)
        if not isinstance(value, Factored):  # of several teachers, which see to it themselves
            return value
        head: Head = replace(value.head, weight=to(value.head.weight), bias=to(value.head.bias))
        return Factored(to(value.hidden), head)

    def heads(value: Heads) -> Heads:
        return replace(
            value,
            query=to(value.query),
            key=to(value.key),
            mask=to(value.mask),
            value=to(value.value),
            whole_query=to(value.whole_query),
        )

    return Signals(
        signals.source,
        distribution(signals.distribution),
        {layer: to(state) for layer, state in signals.states.items()},
        {layer: heads(value) for layer, value in signals.attention.items()},
    )
