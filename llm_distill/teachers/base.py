"""The contract of teachers: what every kind promises, so that objectives need not know the kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from llm_distill.rows import Batch
    from llm_distill.signals import ModelSpec, Request, Signals


class Source(Protocol):
    """A teacher at work."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The weights it holds in this process; None where it has none."""

    def __call__(self, batch: Batch) -> Signals:
        """What the teacher says about a batch, without gradients."""

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for.

        Raises:
            ValueError: If it cannot, naming the signal and the layer.
        """

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class Teacher(Protocol):
    """A spec that knows what it is before weights load."""

    @property
    def config(self) -> PreTrainedConfig:
        """The config of its model."""

    @property
    def spec(self) -> ModelSpec:
        """Depth, width and heads."""

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """Its tokenizer, or None where it is not known."""

    def open(self, request: Request, device: torch.device) -> Source:
        """Load.

        Raises:
            ValueError: If it cannot supply the request, naming kind, signal and layer.
        """
