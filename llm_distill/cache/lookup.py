"""Reading the targets of a batch, in whatever process collates it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_distill.cache.layers import coded, columns
from llm_distill.cache.store import Store
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from llm_distill.keys import Examples

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Of hidden states, by their names."""


@dataclass(frozen=True)
class Lookup:
    """Finds what was written down of examples.

    Attributes:
        folder: Of the cache; each process opens its own files.
        logits: Whether the targets of the rows are wanted.
        layers: Layers whose hidden states are wanted.
    """

    folder: str
    logits: bool = True
    layers: tuple[int, ...] = ()
    _stores: dict[int, Store] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Lookup], tuple[str, bool, tuple[int, ...]]]:
        """Open files stay where they are."""
        return Lookup, (self.folder, self.logits, self.layers)

    @property
    def store(self) -> Store:
        """The cache, as this process has it open."""
        here = os.getpid()
        if here not in self._stores:
            found = Store.open(Path(self.folder))
            own = found.manifest.estimator.columns if self.logits else ()
            self._stores[here] = replace(found, columns=(*own, *columns(self.layers)))
        return self._stores[here]

    def __call__(self, examples: Examples) -> dict[str, Any]:
        """What stands beside a batch: `told`, its targets, and `stored`, its hidden states.

        Both row after row; examples of which nothing was kept are not looked up.

        Raises:
            InputError: If one is not there, or cannot be read.
        """
        store = self.store
        kept = store.manifest.layers
        every = kept is not None and kept.rows == "valid"
        tokens = examples.lengths if every else examples.rows
        numbers = zip(examples.keys, examples.rows, tokens, strict=True)
        wanted = [(key, n, m) for key, n, m in numbers if n or m]
        found = store.fetch([key for key, _, _ in wanted])
        for (_, rows, _), part in zip(wanted, found, strict=True):
            if rows != part.rows:
                raise self._other(f"{part.rows} rows of an example with {rows}")
        beside: dict[str, Any] = {}
        if self.logits:
            head = store.manifest.head
            dtype = DTYPES["float32" if head is None else str(head["dtype"])]
            beside["told"] = store.manifest.estimator.tensors(found, dtype)
        if self.layers and kept is not None:
            beside["stored"] = {k: coded(found, k, kept.width) for k in self.layers}
            have, need = len(beside["stored"][self.layers[0]]), sum(m for _, _, m in wanted)
            if have != need:
                raise self._other(f"states of {have} tokens of examples with {need}")
        return beside

    def _other(self, what: str) -> InputError:
        """The index and the shards do not belong together."""
        return InputError(
            f"the cache {self.folder} has {what}; its index is of other shards: copy it anew"
        )
