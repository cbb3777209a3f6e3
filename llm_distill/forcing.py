"""Blocks that start from given states instead of what the block below them made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llm_distill.blocks import find
from llm_distill.capture import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


class Forcing:
    """Hooks on the blocks of a model; without given states it works as if they were not there.

    The states stay until they are released, so that a checkpointed block is recomputed from the
    same.

    Args:
        model: Whose blocks they are.

    Raises:
        InputError: If its blocks cannot be found.
    """

    def __init__(self, model: nn.Module) -> None:
        self._given: Mapping[int, Tensor] = {}
        inner = plain(model)
        blocks = cast("nn.ModuleList", inner.get_submodule(find(inner)))
        for number, block in enumerate(blocks, start=1):
            block.register_forward_pre_hook(self._hook(number), with_kwargs=True)

    def give(self, states: Mapping[int, Tensor]) -> None:
        """Let blocks 1..depth start from these: `[B, T, D]` each."""
        self._given = states

    def release(self) -> None:
        """Let every block start where the one below it ends."""
        self._given = {}

    def _hook(self, number: int) -> Callable[..., Any]:
        """What one block is called with."""

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401  as torch wants it
            del module
            state = self._given.get(number)
            if state is None:
                return None
            if not args:
                own: Tensor = kwargs["hidden_states"]
                return args, {**kwargs, "hidden_states": state.to(own.dtype)}
            return (state.to(args[0].dtype), *args[1:]), kwargs

        return start
