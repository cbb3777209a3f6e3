"""Reading the targets of a batch, in whatever process collates it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_distill.cache.store import Store
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from llm_distill.cache.estimator import Told
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
    """

    folder: str
    _stores: dict[int, Store] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Lookup], tuple[str]]:
        """Open files stay where they are."""
        return Lookup, (self.folder,)

    @property
    def store(self) -> Store:
        """The cache, as this process has it open."""
        here = os.getpid()
        if here not in self._stores:
            self._stores[here] = Store.open(Path(self.folder))
        return self._stores[here]

    def __call__(self, examples: Examples) -> Told:
        """The targets of a batch, row after row; examples without rows are not looked up.

        Raises:
            InputError: If one is not there, or cannot be read.
        """
        wanted = [(k, n) for k, n in zip(examples.keys, examples.rows, strict=True) if n]
        store = self.store
        found = store.fetch([key for key, _ in wanted])
        for (_, rows), part in zip(wanted, found, strict=True):
            if rows != part.rows:
                raise InputError(
                    f"the cache {self.folder} has {part.rows} rows of an example with {rows}; its "
                    "index is of other shards: copy it anew"
                )
        head = store.manifest.head
        dtype = DTYPES["float32" if head is None else str(head["dtype"])]
        return store.manifest.estimator.tensors(found, dtype)
