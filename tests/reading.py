"""`safe_open`, which tells what is read of the files."""

from typing import Any

import pytest
import transformers.modeling_utils
from safetensors import safe_open
from torch import Tensor

Seen = list[tuple[str, int]]
"""Names of what was read, and bytes."""


class Slice:
    """A tensor in a file, which tells when it is read, and how much of it."""

    def __init__(self, inner: Any, name: str, seen: Seen) -> None:
        self._inner, self._name, self._seen = inner, name, seen

    def __getitem__(self, item: Any) -> Tensor:
        tensor: Tensor = self._inner[item]
        self._seen.append((self._name, tensor.numel() * tensor.element_size()))
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Open:
    """One open file."""

    def __init__(self, inner: Any, seen: Seen) -> None:
        self._inner, self._seen = inner, seen

    def get_slice(self, name: str) -> Slice:
        return Slice(self._inner.get_slice(name), name, self._seen)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]

    def keys(self) -> list[str]:
        return list(self._inner.keys())

    def metadata(self) -> Any:
        return self._inner.metadata()

    def __enter__(self) -> "Open":
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)


def watched(patch: pytest.MonkeyPatch) -> Seen:
    """What transformers reads from now on, as long as the patch holds."""
    seen: Seen = []

    def opened(*args: Any, **kwargs: Any) -> Any:
        return Open(safe_open(*args, **kwargs), seen)

    patch.setattr(transformers.modeling_utils, "safe_open", opened)
    return seen
