"""What waits for a device: copies to it that the host stands still for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Notes copies from the host to a device that holds nothing, unless they are non-blocking.

    Attributes:
        found: Shapes of what was copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at one operation, and do it."""
        del types
        options = dict(kwargs or {})
        there = torch.device(options.get("device") or "cpu").type == "meta"
        if there and not options.get("non_blocking") and isinstance(args[0], Tensor):
            own = args[0]
            if own.device.type == "cpu" and func is torch.ops.aten._to_copy.default:
                self.found.append(tuple(own.shape))
        return func(*args, **options)
