"""What a step of training is made of: micro-batches, their items over all ranks, rehearsals."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llm_distill import binding
from llm_distill.checkpointing import StudentTrainer
from llm_distill.outcomes import Slopes
from llm_distill.preparation import make_batch
from llm_distill.rows import Batch, Step
from llm_distill.signals import Request, Signals
from llm_distill.teachers import Within
from llm_distill.weighing import sent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_distill.ledger import Ledger
    from llm_distill.objectives import QueryPlan, Term
    from llm_distill.teachers import Source


class StepTrainer(StudentTrainer):
    """A Trainer that knows the items of each term in a whole step before it is taken."""

    _source: Source
    _plan: QueryPlan | None
    _ledger: Ledger

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; the attention taps forget the batch, also where the step was cut short."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            self.distiller.release()
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As in Trainer; where a stream ends inside a step, batches without rows fill the step up.

        Trainer would not take it, and add its gradient to that of the next one.
        """
        self.distiller.train()  # an evaluation may have come before
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            samples += [self._silent(samples[-1])] * (num_batches - len(samples))
            if self.distiller.balance.asks(self._together) and not self._alone:
                self._rehearse(samples, cast("Tensor", items))
            if binding.teacher_request(self.run.terms) != Request():
                self._source.prepare([self._batch(inputs).for_teacher for inputs in samples])
        return samples, items

    def _silent(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of which nothing counts."""
        given = {key: value for key, value in inputs.items() if key != "batch"}
        return given | {"batch": make_batch(given, self._plan, seed=0, epoch=0, keep=0)}

    # Rehearsals

    def _rehearse(self, samples: Sequence[Any], items: Tensor) -> None:
        """Measure all terms on the step that is about to be taken, and tell the balance.

        Args:
            samples: Its micro-batches on this rank.
            items: `[K]`, of each term over all of them and all ranks.
        """
        distiller, done = self.distiller, self.state.global_step
        layer = distiller.balance.layer
        step = Step(self._progress, torch.zeros_like(items), rehearsal=True, layer=layer)
        found = torch.zeros(2 * len(items), device=items.device)
        with (
            _own_random_numbers(f"{self.args.seed} {done} {self.args.process_index}", items.device),
            torch.set_grad_enabled(layer is not None),
            self.compute_loss_context_manager(),
        ):
            for inputs in samples:
                batch = self._batch(cast("dict[str, Any]", self._prepare_inputs(inputs)))
                try:
                    outcome = distiller(batch, self._taught(batch), step)
                    if isinstance(outcome, Slopes):
                        squares = outcome.squares(distiller.names)
                        found += torch.stack([*outcome.values, *squares]).detach()
                    else:
                        found[: len(items)] += outcome.sums
                finally:
                    distiller.release()
        values, squares = self._over_ranks(found).view(2, -1)
        distiller.balance.measured(values / items, squares / items.square())
        self._ledger.forget_observed()

    @property
    def _progress(self) -> float:
        """Share of the training that is done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _taught(self, batch: Batch, asked: Request | None = None) -> Signals | None:
        """What the teacher says; it does not run where no term listens, as under cross-entropy.

        None of one that speaks inside the forward.

        Args:
            batch: As the student reads it.
            asked: What is listened to; by default what the terms ask for.
        """
        if (binding.teacher_request(self.run.terms) if asked is None else asked) == Request():
            return Signals(f"teacher {self.run.teacher.spec.name}")
        if isinstance(self._source, Within):
            return None
        return self._source(batch.for_teacher)

    # Items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Items of each term in the micro-batches of a step, over all ranks: `[K]`."""
        del device
        return self._summed([self._batch(inputs) for inputs in batch_samples])

    def _summed(self, batches: Sequence[Batch]) -> Tensor:
        """Items of each term over batches and ranks."""
        totals = [sum(column) for column in zip(*map(self._counts, batches), strict=True)]
        totals = totals or [0] * len(self.run.terms)
        return self._over_ranks(sent(totals, self.args.device))

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        return cast("Tensor", self.accelerator.reduce(values, reduction="sum"))

    def _counts(self, batch: Batch) -> list[int]:
        """Items of each term in this batch."""
        terms = self.run.terms.values()
        return [term.count(batch) if self._counts_now(term) else 0 for term in terms]

    @property
    def _alone(self) -> bool:
        """Whether the student's blocks learn alone in this step."""
        return self.distiller.training and self._alone_after(self.state.global_step)

    def _alone_after(self, done: int) -> bool:
        """The same, of the step after some."""
        progress = done / max(self.state.max_steps, 1)
        return any(term.alone(progress) for term in self.run.terms.values())

    @property
    def _together(self) -> int:
        """Steps that were taken since the blocks learn together."""
        done = range(self.state.global_step)
        return len(done) - bisect_left(done, 1, key=lambda step: not self._alone_after(step))

    def _counts_now(self, term: Term) -> bool:
        """Whether a term takes part in this step."""
        return term.alone(self._progress) or not self._alone

    def _batch(self, inputs: dict[str, Any]) -> Batch:
        """The training batch in what the row collator made, kept beside it."""
        if "batch" not in inputs:
            epoch = int(self.state.epoch or 0)
            inputs["batch"] = make_batch(inputs, self._plan, seed=self.args.seed, epoch=epoch)
        return cast("Batch", inputs["batch"])


@contextmanager
def _own_random_numbers(source: str, device: torch.device) -> Iterator[None]:
    """Random numbers that follow from a text, and leave those of the training alone.

    After a resumption the training's own are set only once the batches of its first step are there.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(source.encode()))
        yield
