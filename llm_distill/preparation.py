"""What a run is made of, checked before weights load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers.trainer_utils import HubStrategy, SaveStrategy

from llm_distill import binding, loading
from llm_distill.binding import make_batch
from llm_distill.capture import Reader, plain, predicts_next
from llm_distill.data import Collator
from llm_distill.data.given import first_of, tokenised
from llm_distill.errors import InputError
from llm_distill.objectives import Evidence, Objective, Term
from llm_distill.rows import Batch, RowCollator
from llm_distill.signals import ModelSpec, Request
from llm_distill.students import FromConfig, Student, as_local, student_spec
from llm_distill.teachers import Local, Source, Teacher
from llm_distill.vocabulary import settle_tokenizers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedModel, TrainingArguments

__all__ = ["CALIBRATION_EXAMPLES", "Run", "check_arguments", "make_batch", "prepare_run"]

CALIBRATION_EXAMPLES = 32
"""Of the training data: what least squares and matched heads are decided on."""

COLUMNS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")
"""What collators and models read; `remove_unused_columns` takes the others away."""

LOWER_IS_BETTER = ("kl", "perplexity")
"""Figures of an evaluation that transformers would maximise, as everything that is no `loss`."""


@dataclass(frozen=True)
class Run:
    """A run before its weights load.

    Attributes:
        model: The student as it was given.
        student: What is known of it.
        teacher: The teacher's spec.
        objectives: What to match.
        terms: The objectives, bound as far as that is possible without data.
        shift: Whether the models are causal.
        kwargs: For `Trainer`, with tokenizer, collator and datasets filled in.
        reports: What became of the rows of datasets that were tokenised here.
    """

    model: Student
    student: ModelSpec
    teacher: Teacher
    objectives: tuple[Objective, ...]
    terms: Mapping[str, Term]
    shift: bool
    kwargs: dict[str, Any]
    reports: tuple[str, ...] = ()

    @property
    def teacher_request(self) -> Request:
        """What the teacher has to give; its logits as well where there is an evaluation."""
        request = binding.teacher_request(self.terms)
        return (
            request | Request(logits=True)
            if self.kwargs.get("eval_dataset") is not None
            else request
        )

    @property
    def collator(self) -> RowCollator:
        """The user's collator, with rows."""
        return RowCollator(
            self.kwargs["data_collator"], shift=self.shift, valid=binding.needs_valid(self.terms)
        )

    def calibrated(self, student: nn.Module, source: Source, args: TrainingArguments) -> Run:
        """The same run, terms that need data bound to one fixed batch, alike on all ranks."""
        ours, theirs = binding.survey(self.objectives, self.student, self.teacher.spec)
        if ours == theirs == Request():
            return self
        batch = self._calibration_batch(args)
        student.to(args.device)
        reader = Reader(student, ours, f"student {self.student.name}")
        training = student.training
        student.eval()
        with torch.no_grad():
            evidence = Evidence(batch, reader.read(batch), source(batch))
        reader.release()
        student.train(training)
        specs = self.student, self.teacher.spec
        terms = binding.bind(self.objectives, *specs, seed=args.seed, evidence=evidence)
        for term in terms.values():
            _broadcast(term, args.device)
        return replace(self, terms=terms)

    def _calibration_batch(self, args: TrainingArguments) -> Batch:
        """The first examples of the training data."""
        dataset = cast("Iterable[Any]", self.kwargs["train_dataset"])
        examples = itertools.islice(dataset, CALIBRATION_EXAMPLES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # collators may draw
            collated = self.collator([_readable(example, args) for example in examples])
        plan = binding.query_plan(self.terms)
        return make_batch(collated, plan, seed=args.seed, epoch=0).to(args.device)


def prepare_run(
    model: Student,
    teacher: str | PreTrainedModel | Teacher,
    objectives: Sequence[Objective],
    args: TrainingArguments,
    kwargs: Mapping[str, Any],
) -> Run:
    """Check everything that can be checked without weights.

    Raises:
        InputError: Saying what was asked, what there is, and what to write instead.
    """
    check_arguments(args, kwargs)
    master = teacher if isinstance(teacher, Teacher) else Local(teacher)
    if _weights(model) is not None and _weights(model) is _weights(master):
        raise InputError("model and teacher are one object; give the teacher a copy of its own")
    student = student_spec(model, master.config)
    terms = binding.bind(objectives, student, master.spec, seed=args.seed)
    if terms and any(term.student.heads for term in terms.values()):
        _check_checkpointing(args)
    shift = _shift(model, master)
    filled = dict(kwargs)
    tokenizer = settle_tokenizers(model, master, student, filled.get("processing_class"))
    filled["processing_class"] = tokenizer
    positions = min((s.positions for s in (student, master.spec) if s.positions), default=None)
    reports: list[str] = []
    collator = filled.get("data_collator")
    for name in ("train_dataset", "eval_dataset"):
        dataset, own = filled.get(name), collator is not None
        filled[name] = tokenised(dataset, tokenizer, positions, reports, name, keep_tokens=own)
    if collator is None:
        filled["data_collator"] = (
            Collator.of(tokenizer) if tokenizer is not None else Collator(pad_token_id=0)
        )
    run = Run(model, student, master, tuple(objectives), terms, shift, filled, tuple(reports))
    _check_training_data(run, args)
    return run


def check_arguments(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that cannot work, and set those whose default would hurt.

    Raises:
        InputError: For several GPUs without a launcher, `model_init`, `compute_loss_func`, or a
            push of checkpoints.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs are visible to one process; start one process for each: "
            f"accelerate launch --num_processes {args.n_gpu} your_script.py (or hide the others "
            "with CUDA_VISIBLE_DEVICES=0)"
        )
    for name in ("model_init", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise InputError(
                f"DistillTrainer takes no {name}: the loss is the objectives', the student is "
                "`model`"
            )
    if args.label_smoothing_factor:
        raise InputError(
            "label_smoothing_factor: the teacher is what smooths the labels; leave it at 0"
        )
    if args.push_to_hub and args.hub_strategy in (
        HubStrategy.CHECKPOINT,
        HubStrategy.ALL_CHECKPOINTS,
    ):
        strategy = HubStrategy(args.hub_strategy).value
        raise InputError(
            f"hub_strategy {strategy!r} would upload optimizer states and projectors; write "
            "every_save or end"
        )
    # The filter reads every micro-batch's loss on the host, and hides what it finds.
    args.logging_nan_inf_filter = False
    _settle_best_metric(args, kwargs.get("eval_dataset"))
    loader: Any = args.accelerator_config
    if loader.dispatch_batches is None:
        # Rows cannot be cut from one process's batch like [B, T] tensors.
        loader.dispatch_batches = False


def _settle_best_metric(args: TrainingArguments, evaluation: object) -> None:
    """KL to the teacher, of the first dataset where there are several, unless one was named."""
    metric = args.metric_for_best_model
    if metric == "loss" or (metric is None and args.save_strategy == SaveStrategy.BEST):
        # What transformers fills in where nothing was said; `eval_loss` says it explicitly.
        first = next(iter(evaluation), None) if isinstance(evaluation, Mapping) else None
        args.metric_for_best_model = "eval_kl" if first is None else f"eval_{first}_kl"
        args.greater_is_better = False
    elif metric is not None and metric.endswith(LOWER_IS_BETTER):
        args.greater_is_better = False


def _weights(model: object) -> nn.Module | None:
    """The loaded model behind a student or a teacher, adapters taken off."""
    inner = model.model if isinstance(model, Local) else model
    return plain(inner) if isinstance(inner, nn.Module) else None


def _readable(example: Any, args: TrainingArguments) -> Any:  # noqa: ANN401  what a collator takes
    """An example without the columns that Trainer takes away."""
    if not args.remove_unused_columns or not isinstance(example, Mapping):
        return example
    return {key: example[key] for key in COLUMNS if key in example}


def _check_training_data(run: Run, args: TrainingArguments) -> None:
    """Refuse training data that the objectives or the collator have no use for.

    Raises:
        InputError: For several splits at once, rows without labels, or nothing to calibrate on.
    """
    dataset = run.kwargs.get("train_dataset")
    if isinstance(dataset, Mapping):
        raise InputError(
            f"train_dataset is a {type(dataset).__name__} of {sorted(dataset)}; give one of them"
        )
    surveyed = binding.survey(run.objectives, run.student, run.teacher.spec)
    if dataset is None and surveyed != (Request(), Request()):
        raise InputError(
            "there is no train_dataset to calibrate on; give one, or write init: random and heads: "
            "mean or group"
        )
    example = first_of(dataset)
    if example is not None:
        with torch.random.fork_rng(devices=[]):
            try:
                run.collator([_readable(example, args)])
            except ValueError as error:
                raise InputError(str(error)) from error


def _shift(model: Student, teacher: Teacher) -> bool:
    """Whether both models are causal.

    Raises:
        InputError: If one is and the other is not.
    """
    theirs = _causal(teacher)
    ours = theirs if isinstance(model, FromConfig) else _causal(as_local(model))
    if ours != theirs:
        kinds = ["causal" if causal else "masked" for causal in (ours, theirs)]
        raise InputError(
            f"the student is a {kinds[0]} language model and the teacher a {kinds[1]} one; take "
            "two of one kind"
        )
    return ours


def _causal(spec: Teacher) -> bool:
    """Whether a model is a causal one, by its class or by what its config was saved from."""
    loaded = getattr(spec, "model", None)
    return (
        predicts_next(loaded)
        if isinstance(loaded, nn.Module)
        else not loading.is_masked(spec.config)
    )


def _check_checkpointing(args: TrainingArguments) -> None:
    """Refuse reentrant checkpointing with attention maps before weights load."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise InputError(
                "AttentionMaps has no gradient under reentrant gradient checkpointing; write "
                "gradient_checkpointing_kwargs: {use_reentrant: false}"
            )


def _broadcast(module: nn.Module, device: torch.device) -> None:
    """Rank 0's tensors on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in module.state_dict().values():
        there = tensor.to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)
