"""Student and terms as one module, so that DDP, FSDP and ZeRO see every trained parameter.

The loss is computed inside the wrapped forward. The teacher is no submodule, unless it is made of
the student: then it is sharded, and computes, as the student does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor, nn

from llm_distill.balance import Balance
from llm_distill.capture import Reader, plain
from llm_distill.errors import InputError
from llm_distill.faults import find
from llm_distill.forcing import Forcing
from llm_distill.losses.fused import Teacher, head_pass, rows_per_chunk, working_dtype
from llm_distill.losses.projection import Projection
from llm_distill.losses.scoring import INFINITE
from llm_distill.measures import measures
from llm_distill.objectives import HeadTerm, Term
from llm_distill.outcomes import Outcome, Slopes
from llm_distill.pieces import lend
from llm_distill.signals import Dense, Distribution, Factored, Request, Signals

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import GenerationConfig, PreTrainedConfig

    from llm_distill.rows import Batch, Step
    from llm_distill.teachers import Within

LOGITS = Request(logits=True)


class Distiller(nn.Module):
    """A student and the terms it is trained with.

    Args:
        student: A transformers or PEFT model.
        terms: Bound objectives under their names in the log.
        name: Of the student, for messages.
        rows_per_chunk: Rows whose logits exist at a time; None: as memory allows.
        balance: Between the terms; None for weights that stay. It is here so that its state moves
            and is saved with the rest.
        within: A teacher that is the student itself, and speaks in the forward.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        student: nn.Module,
        terms: Mapping[str, Term],
        name: str,
        *,
        rows_per_chunk: int | None = None,
        balance: Balance | None = None,
        within: Within | None = None,
    ) -> None:
        super().__init__()
        self.rows_per_chunk = rows_per_chunk
        self.student = student
        self.within = within
        self.balance = balance or Balance()
        self.names = tuple(terms)
        self.terms = nn.ModuleList(terms.values())
        self.request = Request()
        for term in terms.values():
            self.request = self.request | term.student
        self._reader = Reader(student, self.request, f"student {name}")
        starts = [name for name, term in terms.items() if term.alone(0.0)]
        if len(starts) > 1:
            raise InputError(
                f"{starts[0]} and {starts[1]} both let blocks learn alone; a block starts from one "
                "state: write blockwise in one of them"
            )
        self.forcing = Forcing(student) if starts else None

    @property
    def config(self) -> PreTrainedConfig:
        """The student's."""
        return plain(self.student).config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The student's, so that Trainer aligns its special tokens with the tokenizer's."""
        return cast("GenerationConfig | None", plain(self.student).generation_config)

    @property
    def _no_split_modules(self) -> Sequence[str]:
        """The student's blocks, so that FSDP shards block by block."""
        return list(plain(self.student)._no_split_modules or [])

    @property
    def is_activation_checkpointing(self) -> bool:
        """The student's."""
        return bool(plain(self.student).is_activation_checkpointing)

    def get_input_embeddings(self) -> None:
        """None: the head stays in FSDP's root group, where the head pass reads its weight."""

    def get_output_embeddings(self) -> None:
        """None, as `get_input_embeddings`."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The student's, called by Accelerate after sharding."""
        held = None if self.within is None else self.within.model
        for model in (self.student, held):
            if model is not None:
                cast("Any", model).tie_weights(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the plain student, as `trainer.model.save_pretrained(folder)` would for Trainer."""
        cast("Any", self.student).save_pretrained(*args, **kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The student's.

        Raises:
            ValueError: For reentrant checkpointing together with attention maps, which would have
                no gradient, or with a balance that takes gradients at a layer.
        """
        options = kwargs.get("activation_checkpointing_kwargs") or {}
        maps, balanced = bool(self.request.heads), self.balance.layer is not None
        what = {"what reads attention": maps, "balance": balanced}
        for name in (name for name, hurt in what.items() if hurt and options.get("use_reentrant")):
            raise ValueError(
                f"{name} has no gradient under reentrant gradient checkpointing; write "
                "activation_checkpointing_kwargs: {use_reentrant: false}"
            )
        cast("Any", self.student).activation_checkpointing_enable(**kwargs)

    def release(self) -> None:
        """Forget the last batch, once its backward is done."""
        self._reader.release()
        if self.forcing is not None:
            self.forcing.release()

    def forward(self, batch: Batch, teacher: Signals | None, step: Step) -> Outcome | Slopes:
        """One micro-batch; a teacher that is None is the one within."""
        if self.request.logits or self.request.exits or step.measure:
            head = cast("nn.Module", plain(self.student).get_output_embeddings())
            lend(tuple(head.parameters()), self)
        if step.layer is not None:
            return self._slopes(step.layer, teacher, batch, step)
        if step.alone:
            return self._alone(teacher, batch, step)
        signals, teacher = self._heard(batch, teacher, LOGITS if step.measure else Request())
        shares = step.shares
        loss = torch.zeros((), device=shares.device)
        head_terms = [k for k, term in enumerate(self.terms) if isinstance(term, HeadTerm)]
        values = shares.new_zeros(0, 0)
        if head_terms or step.measure:
            loss, values = self._head(head_terms, signals, teacher, batch, step)
        faults = find(values[: len(head_terms)], batch.supervised, batch.inputs["input_ids"])
        # Where a logit of -inf stands for -1e30, a sum is infinite and not merely large.
        row_sums = values.masked_fill(values >= INFINITE, torch.inf).sum(1)
        sums = dict(zip(head_terms, row_sums, strict=False))
        for k, term in enumerate(cast("Iterable[Term]", self.terms)):
            if k not in sums:
                value = term(signals, teacher.member(term.member), batch, step)
                loss = loss + shares[k] * value
                sums[k] = value.detach().to(values.dtype)
        ordered = torch.stack([sums[k] for k in range(len(self.terms))])
        kept = torch.cat([ordered, row_sums[len(head_terms) :]])
        logits = self._reader.full_logits(batch) if step.logits else None
        return Outcome(loss, kept, faults, logits)

    def _heard(
        self, batch: Batch, teacher: Signals | None, extra: Request
    ) -> tuple[Signals, Signals]:
        """What student and teacher say of a batch.

        Args:
            batch: As the student reads it.
            teacher: What it said already; None: it is the one within.
            extra: Wanted of the student besides.
        """
        if teacher is not None:
            return self._reader.read(batch, extra=extra), teacher
        if self.within is None:
            raise ValueError("nobody said what the teacher says, and there is none within")
        return self.within.both(batch, lambda more: self._reader.read(batch, extra=extra | more))

    def _alone(self, teacher: Signals | None, batch: Batch, step: Step) -> Outcome:
        """Blocks that start from states of the teacher, and the term that lets them."""
        terms = cast("Sequence[Term]", self.terms)
        k, term = next((k, t) for k, t in enumerate(terms) if t.alone(step.progress))
        said = cast("Within", self.within)(batch) if teacher is None else teacher
        heard = said.member(term.member)
        cast("Forcing", self.forcing).give(term.starts(heard))
        value = term(self._reader.read(batch), heard, batch, step)
        sums = step.shares.new_zeros(len(self.terms))
        sums[k] = value.detach()
        faults = find(step.shares.new_zeros(0, 0), batch.supervised, batch.inputs["input_ids"])
        return Outcome(step.shares[k] * value, sums, faults, None)

    def _head(
        self, chosen: Sequence[int], student: Signals, teacher: Signals, batch: Batch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """All row-wise terms on logits, and the measures: a pass for each layer they look at."""
        terms = {k: cast("HeadTerm", self.terms[k]) for k in chosen}
        loss = torch.zeros((), device=step.shares.device)
        rows: dict[int, Tensor] = {}
        extra: list[Tensor] = []
        exits = {None} if step.measure else set()
        for exit in sorted(exits | {term.exit for term in terms.values()}, key=str):
            here = [k for k, term in terms.items() if term.exit == exit]
            part = replace(step, measure=step.measure and exit is None)
            value, found = self._pass(here, exit, student, teacher, batch, part)
            loss = loss + value
            rows |= dict(zip(here, found, strict=False))
            extra += list(found[len(here) :])
        return loss, torch.stack([*(rows[k] for k in chosen), *extra])

    def _pass(
        self,
        chosen: Sequence[int],
        exit: int | None,
        student: Signals,
        teacher: Signals,
        batch: Batch,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        """The terms on one layer's logits, and the measures, in one pass."""
        own = _logits(student, exit)
        terms = [cast("HeadTerm", self.terms[k]) for k in chosen]
        compared = teacher.distribution if step.measure else None
        asks_teacher = compared is not None or any(term.teacher.logits for term in terms)
        # One by one: a list as index waits for the GPU.
        shares = [step.shares[k] for k in chosen]
        return head_pass(
            own,
            _target(teacher.logits) if asks_teacher else None,
            batch.supervised.labels,
            [term.row for term in terms],
            torch.stack(shares) if shares else step.shares.new_zeros(0),
            measures=measures(compared, own.vocabulary) if step.measure else (),
            chunk=self._chunk(own),
        )

    def _slopes(self, layer: int, teacher: Signals | None, batch: Batch, step: Step) -> Slopes:
        """Each term apart from the others, and a hidden state of the student."""
        student, teacher = self._heard(batch, teacher, Request(hidden=frozenset({layer})))
        values: list[Tensor] = []
        for term in cast("Iterable[Term]", self.terms):
            if isinstance(term, HeadTerm):
                own = _logits(student, term.exit)
                bias = None if own.bias is None else own.bias.detach()
                value, _ = head_pass(
                    Projection(own.features, own.weight.detach(), bias, own.finish),
                    _target(teacher.logits) if term.teacher.logits else None,
                    batch.supervised.labels,
                    [term.row],
                    step.shares.new_ones(1),
                    chunk=self._chunk(own),
                )
            else:
                value = term(student, teacher.member(term.member), batch, step)
            values.append(value)
        return Slopes(tuple(values), student.states[layer])

    def _chunk(self, student: Projection) -> int:
        """Rows per matrix product, decided once from the memory that is free then."""
        if self.rows_per_chunk is None:
            device = student.features.device
            self.rows_per_chunk = rows_per_chunk(
                working_dtype(student.features),
                device.type,
                frozen=not student.weight.requires_grad,
                vocabulary=student.vocabulary,
                free=free_memory(device),
            )
        return self.rows_per_chunk


def _logits(student: Signals, layer: int | None) -> Projection:
    """The student's logits at one of its exits; at its end for None."""
    found = student.logits if layer is None else student.exits[layer]
    return cast("Factored", found).projection()


def _target(distribution: Distribution) -> Teacher:
    """What the pass over the head works on."""
    if isinstance(distribution, Factored):
        return distribution.projection()
    return distribution.values if isinstance(distribution, Dense) else distribution


def free_memory(device: torch.device) -> int:
    """Bytes a device could still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
