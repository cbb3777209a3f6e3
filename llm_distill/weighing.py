"""Weights of the terms as a step uses them: schedule x gate x balance, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llm_distill import schedules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from llm_distill.balance import Balance
    from llm_distill.objectives import Objective, Term


class Weighing:
    """Weighs K terms.

    Args:
        objectives: Their schedules.
        terms: Under their names in the log, in the same order; some may be gates.
        balance: Between them.
        device: Where the weights are wanted.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        terms: Mapping[str, Term],
        balance: Balance,
        device: torch.device,
    ) -> None:
        self._terms, self._balance, self._device = terms, balance, device
        self._schedules = [objective.weight for objective in objectives]
        self._used: Tensor | None = None

    def written(self, progress: float) -> Tensor:
        """The schedules alone, as evaluations use them: `[K]`."""
        return sent([schedules.at(weight, progress) for weight in self._schedules], self._device)

    def now(self, progress: float, *, balanced: bool = True) -> Tensor:
        """What the next step uses, nothing waiting for the device: `[K]`.

        Args:
            progress: Share of the training that is done.
            balanced: Whether the balance has a say.
        """
        weights = self.written(progress)
        gates = [term.factor() for term in self._terms.values()]
        if any(gate is not None for gate in gates):
            one = torch.ones((), device=self._device)
            weights = weights * torch.stack([one if gate is None else gate for gate in gates])
        if self._balance.moves and balanced:
            weights = weights * self._balance.factors(weights)
        self._used = weights
        return weights

    def shown(self) -> dict[str, float]:
        """For the log: the weights of the last step that are no constants, with one read."""
        pairs = zip(self._terms.items(), self._schedules, strict=True)
        moving = [
            self._balance.moves or callable(weight) or term.factor() is not None
            for (_, term), weight in pairs
        ]
        if self._used is None or not any(moving):
            return {}
        told = zip(self._terms, self._used.tolist(), moving, strict=True)
        return {f"weight/{name}": weight for name, weight, moves in told if moves}


def sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host on the device, in fp32, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
