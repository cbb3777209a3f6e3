"""Calibration: what data decide before training: layer maps, then what depends on them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from llm_distill import binding, mapping, race, surveying
from llm_distill.binding import make_batch
from llm_distill.capture import Reader
from llm_distill.objectives import Evidence
from llm_distill.preparation import readable
from llm_distill.signals import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn
    from transformers import TrainingArguments

    from llm_distill.preparation import Run
    from llm_distill.rows import Batch
    from llm_distill.teachers import Source

CALIBRATION_EXAMPLES = 32
"""Of the training data: what least squares and matched heads are decided on."""


def calibrate(
    run: Run,
    student: nn.Module,
    source: Source,
    args: TrainingArguments,
    make: Callable[..., Any],
) -> Run:
    """The same run, its terms bound to what both models say of the first training examples.

    Layer maps come first, from how similar the layers are; then least-squares projectors and
    matched heads, from one batch on the layers that were chosen.

    Args:
        run: Returned as it is where no objective asks for data.
        student: In evaluation mode while it is read.
        source: The teacher.
        args: Their seed is that of the batch and of trained parts.
        make: `DistillTrainer`, for the trainings of a race.
    """
    run = _mapped(run, student, source, args, make)
    ours, theirs = binding.survey(run.objectives, run.student, run.teacher.spec)
    if ours == theirs == Request() or run.kwargs.get("train_dataset") is None:
        source.ask(run.teacher_request)
        return run
    source.ask(theirs)
    batch = _first_batch(run, args)
    student.to(args.device)
    reader = Reader(student, ours, f"student {run.student.name}")
    training = student.training
    student.eval()
    with torch.no_grad():
        evidence = Evidence(batch, reader.read(batch), source(batch.for_teacher))
    reader.release()
    student.train(training)
    specs = run.student, run.teacher.spec
    terms = binding.bind(run.objectives, *specs, seed=args.seed, evidence=evidence)
    for term in terms.values():
        _broadcast(term, args.device)
    run = replace(run, terms=terms)
    source.ask(run.teacher_request)
    return run


def _mapped(
    run: Run,
    student: nn.Module,
    source: Source,
    args: TrainingArguments,
    make: Callable[..., Any],
) -> Run:
    """The same run with its layer maps decided."""
    if not mapping.undecided(run.objectives):
        return run
    student.to(args.device)
    specs = run.student, run.teacher.spec
    evidence = surveying.survey(run, student, source, args)
    run = replace(run, objectives=mapping.settled(run.objectives, *specs, evidence))
    objectives, told = race.decided(run, student, source, args, evidence, make)
    terms = binding.bind(objectives, *specs, seed=args.seed)
    return replace(run, objectives=objectives, terms=terms, told=(*run.told, *told))


def _first_batch(run: Run, args: TrainingArguments) -> Batch:
    """The first examples of the training data."""
    dataset = cast("Iterable[Any]", run.kwargs["train_dataset"])
    examples = itertools.islice(dataset, CALIBRATION_EXAMPLES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # collators may draw
        collated = run.collator([readable(example, args) for example in examples])
    plan = binding.query_plan(run.terms)
    return make_batch(collated, plan, seed=args.seed, epoch=0).to(args.device)


def _broadcast(module: nn.Module, device: torch.device) -> None:
    """Rank 0's tensors on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in module.state_dict().values():
        there = tensor.to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)
