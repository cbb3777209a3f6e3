"""Calibration: what data decide before training: layer maps, then what depends on them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from datasets import IterableDataset as Stream
from torch.utils.data import IterableDataset as TorchStream

from llm_distill import binding, mapping, race, surveying
from llm_distill.binding import make_batch
from llm_distill.capture import Reader
from llm_distill.data.given import head
from llm_distill.errors import InputError
from llm_distill.objectives import Evidence
from llm_distill.objectives.states import LATER
from llm_distill.preparation import readable
from llm_distill.signals import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn
    from transformers import TrainingArguments

    from llm_distill.objectives import Objective
    from llm_distill.preparation import Run
    from llm_distill.rows import Batch
    from llm_distill.teachers import Source

CALIBRATION_EXAMPLES = 32
"""Of the training data: what matched heads, and projectors that were asked for, are decided on."""

NOTHING = "projectors: random, there are no examples to calibrate on that can be read twice"
"""What a table says where `LATER` did not come."""

ALONE = 128
"""The same, where nobody asked for it and they are read one at a time."""

PLENTY = 32
"""Rows per feature of the student beyond which no more examples are read."""


def calibrate(
    run: Run,
    student: nn.Module,
    source: Source,
    args: TrainingArguments,
    make: Callable[..., Any],
) -> Run:
    """The same run, its terms bound to what both models say of the first training examples.

    Layer maps come first, from how similar the layers are; then least-squares projectors and
    matched heads, from the first examples on the layers that were chosen.

    Args:
        run: Returned as it is where no objective asks for data.
        student: In evaluation mode while it is read.
        source: The teacher.
        args: Their seed is that of the batch and of trained parts.
        make: `DistillTrainer`, for the trainings of a race.
    """
    run = _mapped(run, student, source, args, make)
    ours, theirs = binding.survey(run.objectives, run.student, run.teacher.spec)
    if ours == theirs == Request():
        source.ask(run.teacher_request)
        return run
    source.ask(theirs)
    student.to(args.device)
    reader = Reader(student, ours, f"student {run.student.name}")
    training = student.training
    student.eval()

    def read(batch: Batch) -> Evidence:
        return Evidence(batch, reader.read(batch), source(batch.for_teacher))

    batches = _on_all_ranks(list(_batches(run, args)), args.device)
    with torch.no_grad():
        if batches:
            evidence = replace(read(batches[0]), more=lambda: map(read, batches[1:]))
            run = _bound(run, evidence, args)
    reader.release()
    student.train(training)
    source.ask(run.teacher_request)
    if not batches:
        for term in run.terms.values():
            term.notes = tuple(NOTHING if note == LATER else note for note in term.notes)
    return run


def _on_all_ranks(batches: list[Batch], device: torch.device) -> list[Batch]:
    """As many batches as every rank has: a teacher in pieces is asked by all of them together."""
    if not (dist.is_available() and dist.is_initialized()):
        return batches
    least = torch.tensor(len(batches), device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return batches[: int(least)]


def _bound(run: Run, evidence: Evidence, args: TrainingArguments) -> Run:
    """The same run, its terms bound to what both models say."""
    specs = run.student, run.teacher.spec
    terms = binding.bind(run.objectives, *specs, seed=args.seed, evidence=evidence)
    for term in terms.values():
        _broadcast(term, args.device)
    return replace(run, terms=terms)


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
    for member in mapping.members_of(run.objectives):
        evidence = surveying.survey(run, student, source, args, member=member)
        settled = mapping.settled(run.objectives, *specs, evidence, member=member)
        run = replace(run, objectives=settled)
    objectives, told = race.decided(run, student, source, args, evidence, make)
    terms = binding.bind(objectives, *specs, seed=args.seed)
    return replace(run, objectives=objectives, terms=terms, told=(*run.told, *told))


def _batches(run: Run, args: TrainingArguments) -> Iterator[Batch]:
    """The first examples of the training data.

    One batch where the user asked for what they decide. Otherwise one example at a time, which fits
    any memory and collator and is the same for any size of the training's batches, and no more than
    are needed; none of a stream that may not be read twice.

    Raises:
        InputError: If they were asked for and there are none.
    """
    dataset = cast("Iterable[Any]", run.kwargs.get("train_dataset", ()))
    asked = any(objective.needs_data for objective in _surveying(run))
    once = isinstance(dataset, TorchStream) and not isinstance(dataset, Stream)
    if dataset is None or (once and not asked):
        return
    # A short training of a race would spend as much on calibration as on its steps.
    raced = isinstance(run.teacher, race.Opened)
    count = CALIBRATION_EXAMPLES if asked or raced else ALONE
    examples = [readable(example, args, run.columns) for example in head(dataset, count)]
    if asked and not examples:
        raise InputError(
            "train_dataset has no example to calibrate on; give it some, or write init: random and "
            "heads: mean or group"
        )
    size = len(examples) if asked else 1
    plan = binding.query_plan(run.terms)
    rows = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # collators may draw
        for start in range(0, len(examples), size):
            collated = run.collator(examples[start : start + size])
            batch = make_batch(collated, plan, seed=args.seed, epoch=0).to(args.device)
            yield batch
            rows += len(batch.supervised)
            if rows >= PLENTY * run.student.width:
                return


def _surveying(run: Run) -> list[Objective]:
    """The objectives that ask for calibration data."""
    nothing = Request(), Request()
    specs = run.student, run.teacher.spec
    return [each for each in run.objectives if binding.survey([each], *specs) != nothing]


def _broadcast(module: nn.Module, device: torch.device) -> None:
    """Rank 0's tensors on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in module.state_dict().values():
        there = tensor.to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)
