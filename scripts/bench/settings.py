"""What a benchmark is asked for. Nothing here imports torch: `--help` stays fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPES = ("float32", "bfloat16", "float16")
REFERENCES = ("float32", "float64")
ROUNDS = {"cpu": 5, "cuda": 20}
CHUNKS = {"float32": 256, "bfloat16": 512, "float16": 512}
CUDA_CHUNK = 2048
LENGTHS = (512, 1024, 2048)
"""Tokens of a sequence of `attention`, in turn."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all benchmarks share.

    Attributes:
        vocab: Tokens of both models.
        dtype: Of models, hidden states and heads.
        loss: A public divergence of `llm_distill.losses`, with arguments: `jsd:beta=0.5`.
        rounds: Timed rounds, after an untimed one.
        threads: Of the CPU.
        device: `cpu` or `cuda`.
        seed: Of all data and weights.
        reference: Dtype in which the right answer is computed; float32 means an fp32 softmax of the
            logits that the models' dtype gives.
        arms: Only those with one of these in their name; empty: all.
        memory: Whether to measure peaks, in a fresh process for each arm.
    """

    vocab: int = 32_000
    dtype: str = "float32"
    loss: str = "forward_kl"
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    reference: str = "float32"
    arms: tuple[str, ...] = ()
    memory: bool = True

    def wants(self, name: str) -> bool:
        """Whether an arm was asked for."""
        return not self.arms or any(part.lower() in name.lower() for part in self.arms)

    def parts(self) -> tuple[Self, ...]:
        """What is run one after another, each with a report of its own."""
        return (self,)

    def to_json(self) -> dict[str, Any]:
        """For a report, and for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        known = {field.name: content[field.name] for field in fields(cls)}
        return cls(**known | {"arms": tuple(content["arms"])})


@dataclass(frozen=True, kw_only=True)
class HeadSettings(Settings):
    """The loss alone: hidden states and heads in, gradients out.

    Attributes:
        rows: N.
        chunk: Rows of one GEMM, in the arms that have a choice.
        student_width: Features of the student's hidden states.
        teacher_width: Features of the teacher's.
    """

    rows: int = 1024
    chunk: int = 256
    student_width: int = 512
    teacher_width: int = 1024

    def tiny(self) -> HeadSettings:
        """The same arms on next to nothing."""
        return replace(self, vocab=64, rows=4, chunk=2, student_width=16, teacher_width=16)


@dataclass(frozen=True, kw_only=True)
class StepSettings(Settings):
    """A whole training step of two models as Llama's.

    Attributes:
        batch: Sequences.
        length: Tokens of each.
        chunk: Rows of one GEMM, in our arms.
        prompt: Fraction of each sequence that is prompt, and so not supervised.
        student_layers: Blocks of the student.
        student_width: Its features.
        teacher_layers: Blocks of the teacher.
        teacher_width: Its features.
    """

    batch: int = 4
    length: int = 256
    chunk: int = 256
    prompt: float = 0.0
    student_layers: int = 4
    student_width: int = 256
    teacher_layers: int = 8
    teacher_width: int = 512

    def tiny(self) -> StepSettings:
        """The same arms on next to nothing."""
        shallow = replace(self, student_layers=1, teacher_layers=1)
        narrow = replace(shallow, student_width=64, teacher_width=64)
        return replace(narrow, vocab=min(96, self.vocab), batch=1, length=8)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each sequence that are no targets."""
        return round(self.prompt * self.length)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(StepSettings):
    """What attention maps and relations add to a step of two bodies.

    Attributes:
        length: Tokens of a sequence; 0: each of `LENGTHS` in turn.
        queries: Sampled query rows of a sequence.
    """

    vocab: int = 1_000
    loss: str = "map_kl"
    batch: int = 1
    length: int = 0
    queries: int = 128

    def parts(self) -> tuple[Self, ...]:
        """One for each length."""
        if self.length:
            return (self,)
        return tuple(replace(self, length=length) for length in LENGTHS)

    def tiny(self) -> AttentionSettings:
        """The same arms on next to nothing."""
        shallow = replace(self, student_layers=2, teacher_layers=2, batch=1, length=8)
        return replace(shallow, student_width=64, teacher_width=64, vocab=min(96, self.vocab))


@dataclass(frozen=True, kw_only=True)
class HiddenSettings(StepSettings):
    """What each match of hidden states adds to a distillation step."""

    def tiny(self) -> HiddenSettings:
        """The same arms on next to nothing."""
        small = replace(self, vocab=min(96, self.vocab), batch=1, length=8)
        return replace(small, student_width=64, teacher_width=64)


def default_chunk(dtype: str, device: str) -> int:
    """Rows of one GEMM below which the GEMMs themselves lose time."""
    return CUDA_CHUNK if device == "cuda" else CHUNKS[dtype]


KINDS: dict[str, type[HeadSettings | StepSettings]] = {
    "head": HeadSettings,
    "step": StepSettings,
    "attention": AttentionSettings,
    "hidden": HiddenSettings,
}
"""Settings of each benchmark."""
