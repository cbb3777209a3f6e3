"""Student and terms as one module, so that DDP, FSDP and ZeRO see every trained parameter.

The loss is computed inside the wrapped forward. The teacher is never a submodule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_distill.capture import Reader, plain
from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.fused import RowFunction, Work, head_pass, rows_per_chunk
from llm_distill.objectives import MEASURES, HeadTerm, Term
from llm_distill.objectives.logits import cross_entropy
from llm_distill.signals import Factored, Request, Signals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import GenerationConfig, PreTrainedConfig

    from llm_distill.rows import Batch, Step

LOGITS = Request(logits=True)


class Distiller(nn.Module):
    """A student and the terms it is trained with.

    Args:
        student: A transformers or PEFT model.
        terms: Bound objectives under their names in the log.
        name: Of the student, for messages.
    """

    main_input_name = "input_ids"

    def __init__(self, student: nn.Module, terms: Mapping[str, Term], name: str) -> None:
        super().__init__()
        self.student = student
        self.names = tuple(terms)
        self.terms = nn.ModuleList(terms.values())
        self.request = Request()
        for term in terms.values():
            self.request = self.request | term.student
        self._reader = Reader(student, self.request, f"student {name}")

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
        cast("Any", self.student).tie_weights(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the plain student, as `trainer.model.save_pretrained(folder)` would for Trainer."""
        cast("Any", self.student).save_pretrained(*args, **kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The student's.

        Raises:
            ValueError: For reentrant checkpointing together with attention maps, which would have
                no gradient.
        """
        options = kwargs.get("activation_checkpointing_kwargs") or {}
        if options.get("use_reentrant") and self.request.heads:
            raise ValueError(
                "AttentionMaps has no gradient under reentrant gradient checkpointing; write "
                "activation_checkpointing_kwargs: {use_reentrant: false}"
            )
        cast("Any", self.student).activation_checkpointing_enable(**kwargs)

    def release(self) -> None:
        """Forget the last batch, once its backward is done."""
        self._reader.release()

    def forward(
        self, batch: Batch, teacher: Signals, step: Step
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One micro-batch.

        Returns:
            The loss, a scalar in fp32; detached sums `[K]` of the terms, followed by those of
            `MEASURES` where the step asks to measure; full logits `[B, T, V]` where it asks for
            them, else None.
        """
        signals = self._reader.read(batch, extra=LOGITS if step.measure else None)
        shares = step.shares
        loss = torch.zeros((), device=shares.device)
        head_terms = [k for k, term in enumerate(self.terms) if isinstance(term, HeadTerm)]
        values = shares.new_zeros(0)
        if head_terms or step.measure:
            loss, values = self._head(head_terms, signals, teacher, batch, step)
        sums = dict(zip(head_terms, values, strict=False))
        for k, term in enumerate(self.terms):
            if k not in sums:
                value = term(signals, teacher, batch, step)
                loss = loss + shares[k] * value
                sums[k] = value.detach().to(values.dtype)
        measured = values[len(head_terms) :]
        kept = torch.cat([torch.stack([sums[k] for k in range(len(self.terms))]), measured])
        return loss, kept, self._reader.full_logits(batch) if step.logits else None

    def _head(
        self, chosen: Sequence[int], student: Signals, teacher: Signals, batch: Batch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """All row-wise terms on logits, and the measures, in one pass."""
        own = cast("Factored", student.logits)
        terms = [cast("HeadTerm", self.terms[k]) for k in chosen]
        functions: list[RowFunction] = [cast("RowFunction", term.values) for term in terms]
        shares = [step.shares[k] for k in chosen]  # one by one: a list as index waits for the GPU
        if step.measure:
            functions += _measures(min(len(own.head.weight), _vocabulary(teacher)))
            shares += step.shares.new_zeros(len(MEASURES)).unbind()
        asks_teacher = step.measure or any(term.teacher.logits for term in terms)
        work = Work(
            functions=functions,
            labels=batch.supervised.labels,
            teacher=_frozen(teacher) if asks_teacher else None,
            finish=own.head.finish,
            chunk=rows_per_chunk(len(own.head.weight)),
        )
        return head_pass(
            own.head.features(own.hidden), own.head.weight, own.head.bias, torch.stack(shares), work
        )


def _frozen(teacher: Signals) -> Any:  # noqa: ANN401  a closure
    """The teacher's logits of some rows, without a graph."""
    distribution = teacher.logits

    def logits(rows: slice) -> Tensor:
        with torch.no_grad():
            return distribution.logits(rows)

    return logits


def _vocabulary(teacher: Signals) -> int:
    """Rows of the teacher's head."""
    distribution = teacher.logits
    return (
        len(distribution.head.weight)
        if isinstance(distribution, Factored)
        else distribution.values.shape[-1]
    )


def _measures(common: int) -> list[RowFunction]:
    """Row functions of `MEASURES`, at temperature 1."""

    def teacher_nll(s: Tensor, t: Tensor | None, labels: Tensor) -> Tensor:
        del s
        return cross_entropy(cast("Tensor", t), labels)

    def kl(s: Tensor, t: Tensor | None, labels: Tensor) -> Tensor:
        del labels
        return forward_kl(s[:, :common], cast("Tensor", t)[:, :common])

    def agreement(s: Tensor, t: Tensor | None, labels: Tensor) -> Tensor:
        del labels
        same = s[:, :common].argmax(-1) == cast("Tensor", t)[:, :common].argmax(-1)
        return same.to(s.dtype)

    return [lambda s, t, labels: cross_entropy(s, labels), teacher_nll, kl, agreement]
