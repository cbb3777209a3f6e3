"""Two small models as Llama's, a batch of tokens, and what a step reads of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llm_distill.binding import bind, make_batch, teacher_request
from llm_distill.collation import RowCollator
from llm_distill.distiller import Distiller
from llm_distill.rows import IGNORED, Batch, Step
from llm_distill.signals import ModelSpec, Signals
from llm_distill.teachers.local import Local
from scripts.bench.inputs import Inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from llm_distill.objectives import Objective, QueryPlan, Term
    from scripts.bench.settings import StepSettings

HEAD_WIDTH = 64
SHARPER = 4.0
"""Factor on the random heads: as they are, a divergence is little but rounding."""


@dataclass(frozen=True)
class Models:
    """Student, teacher and one batch.

    Attributes:
        student: Trained.
        teacher: Frozen.
        ids: `[B, T]`.
        targets: `[B, T]`, -100 on the prompt, beside their own token as in transformers.
        chunk: Rows of one GEMM.
    """

    student: LlamaForCausalLM
    teacher: LlamaForCausalLM
    ids: Tensor
    targets: Tensor
    chunk: int

    @classmethod
    def build(cls, settings: StepSettings) -> Models:
        """Random weights and tokens."""
        s = settings
        student = _llama(s, s.student_width, s.student_layers)
        teacher = _llama(s, s.teacher_width, s.teacher_layers)
        ids = torch.randint(s.vocab, (s.batch, s.length)).to(s.device)
        targets = ids.clone()
        targets[:, : s.prompt_tokens] = IGNORED
        return cls(
            student, teacher.requires_grad_(requires_grad=False).eval(), ids, targets, s.chunk
        )

    @property
    def shifted(self) -> Tensor:
        """`[B, T - 1]`, what each position but the last predicts."""
        return self.targets[:, 1:]

    @property
    def supervised(self) -> Tensor:
        """`[B, T - 1]`, where there is something to predict."""
        return self.shifted != IGNORED

    def teacher_hidden(self) -> Tensor:
        """Its last hidden states `[B, T, Ht]`, without a graph or a cache."""
        with torch.no_grad():
            return _hidden(self.teacher, self.ids)

    def student_hidden(self) -> Tensor:
        """Its last hidden states `[B, T, Hs]`."""
        return _hidden(self.student, self.ids)

    def teacher_logits(self, *, cache: bool = False) -> Tensor:
        """All its logits `[B, T, V]`."""
        with torch.no_grad():
            logits: Tensor = _call(self.teacher, input_ids=self.ids, use_cache=cache).logits
        return logits

    def student_logits(self) -> Tensor:
        """All its logits `[B, T, V]`."""
        logits: Tensor = _call(self.student, input_ids=self.ids).logits
        return logits

    def rows(self, teacher: Tensor, student: Tensor) -> Inputs:
        """The supervised rows of hidden states `[B, T, H]`, with both heads."""
        kept = self.supervised
        return Inputs(
            student[:, :-1][kept],
            self.student.lm_head.weight,
            teacher[:, :-1][kept],
            self.teacher.lm_head.weight,
            self.shifted[kept],
        )

    def batch(self, plan: QueryPlan | None = None) -> Batch:
        """As DistillTrainer hands it to its distiller, with the queries of a plan."""
        given = {
            "input_ids": self.ids.cpu(),
            "attention_mask": torch.ones_like(self.ids, device="cpu"),
            "labels": self.targets.cpu(),
        }
        collated = RowCollator(lambda _: given, shift=True, valid=False)([])
        return make_batch(collated, plan, seed=0, epoch=0).to(self.ids.device)

    def distiller(self, terms: Mapping[str, Term]) -> Distiller:
        """As DistillTrainer makes it."""
        return Distiller(self.student, terms, "student", rows_per_chunk=self.chunk)

    def step(
        self, objectives: Sequence[Objective], weights: Sequence[float]
    ) -> Callable[[], Tensor]:
        """A micro-batch of DistillTrainer: teacher, student, loss, backward.

        Args:
            objectives: What is trained for.
            weights: Of each, for the mean over all rows.
        """
        device = self.ids.device
        spec = ModelSpec.of(self.student.config, "student")
        local = Local(self.teacher)
        terms = bind(objectives, spec, local.spec, seed=0)
        request = teacher_request(terms)
        source = local.open(request, device) if request.logits else None
        distiller, batch = self.distiller(terms), self.batch()
        shares = torch.tensor(weights, device=device) / int(self.supervised.sum())

        def run() -> Tensor:
            said = Signals("no teacher") if source is None else source(batch)
            loss: Tensor = distiller(batch, said, Step(0.0, shares))[0]
            loss.backward()
            distiller.release()
            return loss

        return run


def _llama(settings: StepSettings, width: int, layers: int) -> LlamaForCausalLM:
    """Random weights; heads of 64, an MLP of 8 / 3 of the width."""
    heads = max(1, width // HEAD_WIDTH)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(2048, settings.length),
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPER)
    dtype: torch.dtype = vars(torch)[settings.dtype]
    cast("Any", model).to(device=settings.device, dtype=dtype)
    return model


def _hidden(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Last hidden states of the backbone."""
    hidden: Tensor = _call(model.model, input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _call(model: Any, **inputs: Any) -> Any:  # noqa: ANN401  transformers' outputs
    """A forward pass."""
    return model(**inputs)
