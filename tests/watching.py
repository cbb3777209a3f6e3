"""What a teacher in pieces has gathered while it runs, and how often."""

from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from llm_distill import blocks, lm_head, pieces


class Watch:
    """Looks whenever a block is about to run, before and after FSDP's own hook gathers it.

    Attributes:
        forwards: Of the model.
        gathers: Blocks that lay in pieces when their turn came, over all forwards.
        heads: How often the head was made whole for the head pass.
        block: Bytes of the largest block.
        live: Most bytes that were whole at once, heads of the head pass included.
        beside: Weights that were whole beside a block.
        kept: Most bytes of heads of an earlier head pass that were still there.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.forwards = self.gathers = self.heads = self.block = self.live = self.kept = 0
        self.beside: set[str] = set()
        self._made: list[tuple[StorageWeakRef, int]] = []
        for place, layer in enumerate(model.get_submodule(blocks.find(model))):
            layer.register_forward_pre_hook(self._before, prepend=True)
            layer.register_forward_pre_hook(partial(self._look, first=place == 0))
        lm_head.whole = self._whole  # type: ignore[attr-defined]  # what its module imported

    def _before(self, block: Any, inputs: Any) -> None:
        """Does it have to be gathered?"""
        del inputs
        self.gathers += any(isinstance(p, DTensor) for p in block.parameters())

    def _look(self, block: Any, inputs: Any, *, first: bool) -> None:
        """What is whole now?"""
        del inputs
        own = {id(weight) for weight in block.parameters()}
        every = self._model.named_parameters(remove_duplicate=False)
        others = {n for n, p in every if not isinstance(p, DTensor) and id(p) not in own}
        kept = sum(size for storage, size in self._made if not storage.expired())
        self.forwards += first
        self.beside |= others
        self.kept = max(self.kept, kept)
        self.block = max(self.block, gathered(block))
        self.live = max(self.live, kept + gathered(self._model))

    def _whole(self, weight: Tensor) -> Tensor:
        """A weight of the head, which is gathered apart from its module."""
        found = pieces.whole(weight)
        head = self._model.get_output_embeddings()
        if isinstance(weight, DTensor) and head is not None and weight is head.weight:
            self.heads += 1
            storage = found.untyped_storage()
            self._made.append((StorageWeakRef(storage), storage.nbytes()))
        return found

    def told(self) -> dict[str, Any]:
        """All of it, and the bytes of every weight by its names."""
        every = self._model.named_parameters(remove_duplicate=False)
        sizes = {name: p.numel() * p.element_size() for name, p in every}
        seen = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return seen | {"beside": sorted(self.beside), "sizes": sizes}


def gathered(model: Any) -> int:
    """Bytes of weights that are whole here."""
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
    stores = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in plain}
    return sum(stores.values())
