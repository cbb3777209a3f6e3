"""The contract of teachers: what has it is one, whatever its class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from llm_distill import DistillTrainer, Local, Logits
from llm_distill.rows import Batch
from llm_distill.signals import Dense, ModelSpec, Request, Signals
from llm_distill.teachers import Source, Teacher
from tests import tiny


class Table:
    """A source that knows one distribution only."""

    model = None
    closed = False
    told = ()

    def __call__(self, batch: Batch) -> Signals:
        logits = torch.linspace(0, 3, tiny.VOCABULARY).expand(len(batch.supervised), -1)
        return Signals("table", Dense(logits))

    def prepare(self, batches: Sequence[Batch]) -> None:
        del batches

    def ask(self, request: Request) -> None:
        if request.hidden or request.heads:
            raise ValueError("a table has no hidden states")

    def close(self) -> None:
        self.closed = True


class Unigram:
    """A teacher without a model."""

    @property
    def config(self) -> PreTrainedConfig:
        return LlamaConfig(vocab_size=tiny.VOCABULARY)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec("unigram", "table", 1, 1, 1, tiny.VOCABULARY)

    def find_tokenizer(self) -> Any | None:
        return None

    def check(self, request: Request, device: torch.device) -> None:
        assert request == Request(logits=True)

    def open(self, request: Request, device: torch.device) -> Source:
        del device
        assert request == Request(logits=True)
        return Table()


def test_what_keeps_the_contract_is_a_teacher(teacher: PreTrainedModel) -> None:
    assert isinstance(Unigram(), Teacher)
    assert isinstance(Local(teacher), Teacher)
    assert not isinstance(teacher, Teacher)
    assert not isinstance("an/id", Teacher)


def test_a_run_needs_no_more_than_the_contract(tmp_path: Path, student: PreTrainedModel) -> None:
    trainer = DistillTrainer(
        student, Unigram(), [Logits()], tiny.arguments(tmp_path), train_dataset=tiny.rows(24)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
