"""What a training run counts between two logs, on the device: terms, measures, rows at fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llm_distill.balance import Balance
from llm_distill.evaluation import FIGURES, Tally, known
from llm_distill.faults import Faults
from llm_distill.objectives import MEASURES, HeadTerm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.objectives import Term
    from llm_distill.outcomes import Outcome


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
        balance: Between the terms; None for weights that stay.
    """

    def __init__(
        self, terms: Mapping[str, Term], ranks: Ranks, balance: Balance | None = None
    ) -> None:
        self._terms, self._ranks = terms, ranks
        self._balance = balance or Balance()
        self._tally = Tally((*terms, *MEASURES), ranks.device)
        rowwise = [name for name, term in terms.items() if isinstance(term, HeadTerm)]
        self._faults = Faults(rowwise, ranks.device)
        heard = any(term.adapts or term.observes for term in terms.values())
        self._adapts = heard or self._balance.hears
        self._step = torch.zeros(len(terms), device=ranks.device)
        self._skipped = [0] * len(terms)
        for term in terms.values():
            if term.observes:
                term.observed = torch.zeros(term.observes, device=ranks.device)

    def reset(self) -> None:
        """Start over."""
        self._tally.reset()
        self._faults.reset()
        self._skipped = [0] * len(self._terms)
        self._step.zero_()
        self.forget_observed()

    def forget_observed(self) -> None:
        """Drop what terms observed since the last step, in a backward that was none of a step."""
        for term in self._terms.values():
            if term.observed is not None:
                term.observed.zero_()

    def skip(self, groups: Sequence[int]) -> None:
        """Groups of one micro-batch that are too small for their terms, on the host."""
        self._skipped = [a + b for a, b in zip(self._skipped, groups, strict=True)]

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
        """Tell terms and balance that adapt how the step went: one sum over ranks, or none.

        Args:
            progress: Share of the training that is done.
        """
        if not self._adapts:
            return
        taken = [t.observed for t in self._terms.values() if t.observed is not None]
        sums = self._ranks.reduce(torch.cat([self._step, *taken]))
        means, *observed = sums.split([len(self._step), *map(len, taken)])
        seen = iter(observed)
        for mean, term in zip(means.unbind(), self._terms.values(), strict=True):
            own = None if term.observed is None else next(seen)
            if term.adapts or own is not None:
                term.after_step(mean, progress, own)
        self._balance.after_step(means)
        self._step.zero_()
        self.forget_observed()

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
            shown |= {f"{figure}/{name}": value for figure, value in term.figures().items()}
        skipped = self._ranks.reduce(torch.tensor(self._skipped, device=self._ranks.device))
        self._skipped = [0] * len(self._terms)
        for name, groups in zip(self._terms, skipped.tolist(), strict=True):
            if groups:
                shown[f"skipped/{name}"] = float(groups)
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
