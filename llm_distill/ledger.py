"""What a training run counts between two logs, on the device: terms, measures, rows at fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llm_distill.evaluation import FIGURES, Tally, known
from llm_distill.faults import Faults
from llm_distill.objectives import MEASURES, HeadTerm
from llm_distill.objectives.moving import MovingTerm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.distiller import Outcome
    from llm_distill.objectives import Term


@dataclass(frozen=True)
class Ranks:
    """What a ledger needs to know of the run it keeps.

    Attributes:
        device: Where the sums live.
        reduce: Sum over ranks.
        gather: Concatenation over ranks.
        decode: From token ids to text, where there is a tokenizer.
    """

    device: torch.device
    reduce: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    decode: Callable[..., str] | None = None


class Ledger:
    """Adds up micro-batches; nothing waits for the device until a log is due.

    Args:
        terms: Under their names in the log.
        ranks: Of the run.
    """

    def __init__(self, terms: Mapping[str, Term], ranks: Ranks) -> None:
        self._terms, self._ranks = terms, ranks
        self._tally = Tally((*terms, *MEASURES), ranks.device)
        rowwise = [name for name, term in terms.items() if isinstance(term, HeadTerm)]
        self._faults = Faults(rowwise, ranks.device)
        self._adapts = any(term.adapts for term in terms.values())
        self._step = torch.zeros(len(terms), device=ranks.device)

    def reset(self) -> None:
        """Start over."""
        self._tally.reset()
        self._faults.reset()
        self._step.zero_()

    def add(
        self,
        outcome: Outcome,
        counts: Sequence[int],
        rows: int,
        *,
        items: Tensor,
        step: int,
    ) -> None:
        """One micro-batch.

        Args:
            outcome: What it gave.
            counts: Items of the terms, on the host.
            rows: Supervised rows, over which measures are taken.
            items: Of the terms in the whole step over all ranks, `[K]`.
            step: Its number, from 1.
        """
        known, sums = len(counts), outcome.sums
        if len(sums) == known:
            sums, rows = torch.cat([sums, sums.new_zeros(len(MEASURES))]), 0
        self._tally.add(sums, [*counts, *[rows] * len(MEASURES)])
        self._faults.add(outcome.faults, step)
        if self._adapts:
            self._step += (sums[:known] / items).to(self._step.dtype)

    def after_step(self, progress: float) -> None:
        """Tell the terms that adapt how the step went: one sum over ranks, none where none does.

        Args:
            progress: Share of the training that is done.
        """
        if not self._adapts:
            return
        means = self._ranks.reduce(self._step)
        for mean, term in zip(means.unbind(), self._terms.values(), strict=True):
            if term.adapts:
                term.after_step(mean, progress)
        self._step = torch.zeros_like(self._step)

    def check(self) -> None:
        """Ask the device whether a row was at fault.

        Raises:
            FloatingPointError: On all ranks alike, if there was one since the last check.
        """
        self._faults.check(self._ranks.gather, self._ranks.decode)

    def report(self) -> dict[str, float]:
        """Means for the log, and start over.

        Raises:
            FloatingPointError: If a row was at fault since the last report.
        """
        self.check()
        means = known(self._tally.means(self._ranks.reduce))
        shown = {f"loss/{name}": means[name] for name in self._terms if name in means}
        for name, term in self._terms.items():
            if isinstance(term, MovingTerm):
                shown[f"target/{name}"] = float(term.mix)
        return shown | {name: means[name] for name in FIGURES if name in means}


class AfterStep(TrainerCallback):
    """Tells a ledger that an optimizer step is done, before anything is logged or saved.

    Args:
        ledger: Whose terms may adapt.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As Trainer calls it."""
        del args, control, kwargs
        self._ledger.after_step(state.global_step / max(state.max_steps, 1))


def logs_next(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that runs now will be logged.

    Logs at the end of an epoch are not foreseen: the length of a stream is not known.
    """
    step = state.global_step + 1
    regular = args.logging_strategy == IntervalStrategy.STEPS and state.logging_steps
    first = step == 1 and args.logging_first_step
    return bool(first or (regular and step % state.logging_steps == 0))
