"""Tensor parallelism: processes that compute each layer together have to see the same batch.

Each process trains on rows of its own. Before the teacher runs, the batches of all of them are put
side by side; afterwards each takes its own sequences out of what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_distill.placement.joining import TAKEN, padded, with_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llm_distill.attention import Heads
    from llm_distill.rows import Batch


@dataclass(frozen=True)
class Spread:
    """The processes that share a model's layers.

    Attributes:
        group: Of these processes.
    """

    group: dist.ProcessGroup

    @classmethod
    def of(cls, model: PreTrainedModel) -> Spread:
        """Those of a model that was loaded with tensor parallelism."""
        manager: Any = model._mesh_manager
        return cls(manager.get_mesh("tp").get_group())

    def widened(self, batch: Batch) -> Batch:
        """The inputs and queries of all processes, in their order, padded to the largest batch.

        A collective. Its rows stay those of this process, and index its own batch.
        """
        queries, ids = batch.queries, batch.inputs["input_ids"]
        there = [name in batch.inputs for name in TAKEN]
        asked = 0 if queries is None else queries.position.shape[1]
        found = self._gathered(torch.tensor([[*ids.shape, asked, *there]], device=ids.device))
        most, length, places, *given = found.amax(0).tolist()
        names = {name for name, is_given in zip(TAKEN, given, strict=True) if is_given}
        # A mask that hides all of a sequence would make NaN of it: those that nobody has see all.
        wide = {
            name: self._padded(own, (most, length), fill=int(name == "attention_mask"))
            for name, own in with_all(batch.inputs, names | set(batch.inputs)).items()
        }
        if queries is None:
            return replace(batch, inputs=wide)
        position = self._padded(queries.position, (most, places))
        return replace(batch, inputs=wide, queries=replace(queries, position=position))

    def own(self, states: Tensor, batch: Batch) -> Tensor:
        """The sequences of this process: `[n * most, length, D] -> [B, T, D]`."""
        sequences, length = batch.inputs["input_ids"].shape
        return self._first(states)[:sequences, :length]

    def own_heads(self, heads: Heads, batch: Batch) -> Heads:
        """All heads of this process's sequences, of some heads of all sequences. A collective.

        Args:
            heads: What a tap caught on this process: its share of the heads, all sequences.
            batch: Of this process.
        """

        def every(part: Tensor | None) -> Tensor | None:
            return None if part is None else self._exchanged(part)

        sequences, length = batch.inputs["input_ids"].shape
        places = 0 if batch.queries is None else batch.queries.position.shape[1]
        mask = heads.mask
        if mask is not None:
            alike = mask.shape[1] == 1  # for all heads
            mask = mask if len(mask) == 1 else self._first(mask) if alike else every(mask)
        whole = replace(
            heads,
            query=self._exchanged(heads.query),
            key=self._exchanged(heads.key),
            mask=mask,
            value=every(heads.value),
            whole_query=every(heads.whole_query),
        )
        return whole.part(slice(sequences), places, length)

    def _first(self, every: Tensor) -> Tensor:
        """From this process's first sequence on: `[n * most, …] -> [most, …]`."""
        most = len(every) // self.group.size()
        return every[self.group.rank() * most :][:most]

    def _padded(self, own: Tensor, sizes: tuple[int, int], *, fill: int = 0) -> Tensor:
        """Everyone's `[B, T]` as `[n * most, length]`.

        Args:
            own: Of this process.
            sizes: Sequences and tokens of the largest batch.
            fill: In whole sequences that nobody has.
        """
        return self._gathered(padded(own, sizes, fill=fill))

    def _gathered(self, own: Tensor) -> Tensor:
        """Everyone's tensor of the same shape, one after the other."""
        found = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(found, own.contiguous(), group=self.group)
        return torch.cat(found)

    def _exchanged(self, part: Tensor) -> Tensor:
        """From own heads of all sequences to all heads of own ones.

        `[n * most, H / n, R, d] -> [most, H, R, d]`
        """
        ranks = self.group.size()
        part = part.contiguous()
        found = torch.empty_like(part)
        dist.all_to_all_single(found, part, group=self.group)
        split = found.unflatten(0, (ranks, -1)).transpose(0, 1)
        whole: Tensor = split.flatten(1, 2)
        return whole
