"""A cache at work: what was written down of each batch, as signals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llm_distill.cache.estimator import Estimator, distribution
from llm_distill.cache.lookup import Lookup
from llm_distill.signals import Request, Signals
from llm_distill.teachers.local_source import moved

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from llm_distill.cache.manifest import Manifest
    from llm_distill.cache.store import Store
    from llm_distill.coded import Coded
    from llm_distill.rows import Batch


class CachedSource:
    """A cache at work.

    Args:
        store: The cache.
        request: What is asked for: logits, hidden states of layers it has, or nothing.
        device: Where the signals are wanted.
    """

    model: PreTrainedModel | None = None
    told: tuple[str, ...] = ()

    def __init__(self, store: Store, request: Request, device: torch.device) -> None:
        self.device = device
        self._folder, self._manifest = str(store.folder), store.manifest
        self._name = f"cache of {store.manifest.teacher}"
        head = store.head()
        if head is not None:  # once, not with every batch
            bias = None if head.bias is None else head.bias.to(device)
            head = replace(head, weight=head.weight.to(device), bias=bias)
        self._head = head
        wanted = store.frames().items() if request.hidden else ()
        self._frames = {k: frame.to(device) for k, frame in wanted if k in request.hidden}
        self._lookup: Lookup | None = None
        self._closed = False
        self.ask(request)

    def __call__(self, batch: Batch) -> Signals:
        """What was written down of a batch."""
        if self._closed:
            raise RuntimeError("this teacher was closed; open it again")
        asked = self._request
        if self._lookup is None:
            return Signals(self._name)
        told, stored = batch.told, batch.stored or {}
        if (asked.logits and told is None) or not asked.hidden <= stored.keys():
            found = self._found(batch)  # it was not read where the batch was collated
            told, stored = found.get("told"), found.get("stored", {})
        spoken = None if told is None or not asked.logits else distribution(told, self._head)
        return moved(Signals(self._name, spoken, self._states(batch, stored)), self.device)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing to do: what was written is read where batches are collated."""

    def ask(self, request: Request) -> None:
        """From now on give these signals only."""
        refuse_signals(request, self._name, self._manifest)
        self._request = request
        asks = request.logits or request.hidden
        layers = tuple(sorted(request.hidden))
        self._lookup = Lookup(self._folder, request.logits, layers) if asks else None

    def close(self) -> None:
        """Let the files go; twice is once."""
        self._lookup = self._head = None
        self._frames, self._closed = {}, True

    def _found(self, batch: Batch) -> dict[str, Any]:
        """What the files have of a batch."""
        if batch.examples is None or self._lookup is None:
            raise LookupError(
                "this batch was collated without the keys of its examples, by which a cache finds "
                "them; make it with RowCollator(named=True)"
            )
        return self._lookup(batch.examples)

    def _states(self, batch: Batch, stored: Mapping[int, Coded]) -> dict[int, Tensor]:
        """Hidden states of the asked layers, each token at its place: layer -> `[B, T, D]`.

        Padding is 0. Where supervised tokens alone were kept, all others are NaN: a term that read
        them unasked would be told.
        """
        kept = self._manifest.layers
        if kept is None or not self._request.hidden:
            return {}
        rows, (size, length) = batch.rows(kept.rows), batch.inputs["input_ids"].shape[:2]
        dtype = torch.bfloat16 if self._manifest.dtype == "bfloat16" else torch.float32
        found = {}
        for layer in sorted(self._request.hidden):
            own = stored[layer].rows(slice(len(rows))).to(self.device)  # those that count
            states = self._frames[layer].states(own.values()).to(dtype)
            fill = 0.0 if kept.rows == "valid" else torch.nan
            whole = states.new_full((size * length, kept.features), fill)
            whole.index_copy_(0, rows.index.to(self.device), states)
            found[layer] = whole.view(size, length, -1)
        return found


def refuse_signals(request: Request, owner: str, manifest: Manifest) -> None:
    """Refuse what a finished cache does not hold.

    Raises:
        ValueError: Naming the signal and the layers.
    """
    layers = () if manifest.layers is None else manifest.layers.layers
    refuse_layers(request, owner, manifest.estimator, layers)


def refuse_layers(
    request: Request, owner: str, estimator: Estimator, held: Collection[int] = ()
) -> None:
    """Refuse what a cache does not hold.

    Args:
        request: What is asked for.
        owner: Of the cache or the objective, for the message.
        estimator: What is kept of the logits.
        held: Layers whose hidden states are kept.

    Raises:
        ValueError: Naming the signal and the layers.
    """
    states = f", and hidden states {', '.join(map(str, held))}" if held else ""
    keep = "CrossEntropy, Logits and objectives on these" if held else "CrossEntropy and Logits"
    instead = f"keep to {keep}, or write teacher: {{Local: …}}"
    again = "run llm-distill cache on this recipe with " + (
        "another path" if held else "states: true in Cached"
    )
    asked = (
        ("hidden states", request.hidden - set(held), f"{again}, or {instead}"),
        ("the attention of blocks", request.heads, instead),
    )
    for what, layers, way in asked:
        if layers:
            raise ValueError(
                f"{owner}: a cache (Cached) holds the teacher's logits, here as {estimator}"
                f"{states}, and {what} {', '.join(map(str, sorted(layers)))} are asked for; {way}"
            )
