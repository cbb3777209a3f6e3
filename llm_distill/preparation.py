"""What a run is made of, checked before weights load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import HubStrategy

from llm_distill import binding, loading
from llm_distill.binding import make_batch
from llm_distill.capture import plain, predicts_next
from llm_distill.collation import RowCollator, first_batch
from llm_distill.data import Collator, Prepared
from llm_distill.data.given import first_of, tokenised
from llm_distill.errors import InputError
from llm_distill.evaluation import settle_best_metric
from llm_distill.objectives import Objective, Term
from llm_distill.signals import ModelSpec, Request
from llm_distill.students import (
    FromConfig,
    Student,
    as_local,
    refuse_adapted_head,
    student_spec,
)
from llm_distill.teachers import Local, Teacher
from llm_distill.vocabulary import settle_tokenizers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainingArguments

__all__ = ["Run", "check_arguments", "make_batch", "prepare_run"]

COLUMNS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")
"""What collators and models read; `remove_unused_columns` takes the others away."""

CHECKED = 1000
"""Examples that are looked at before training, for one that has something supervised."""


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
        prepared: What became of the rows of datasets that were tokenised here, by their names.
    """

    model: Student
    student: ModelSpec
    teacher: Teacher
    objectives: tuple[Objective, ...]
    terms: Mapping[str, Term]
    shift: bool
    kwargs: dict[str, Any]
    prepared: Mapping[str, Prepared] = field(default_factory=dict)

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
            self.kwargs["data_collator"],
            shift=self.shift,
            valid=binding.needs_valid(self.terms),
            positions=self.positions,
        )

    @property
    def positions(self) -> int | None:
        """Tokens a sequence may have: the fewer of both models'."""
        known = (self.student.positions, self.teacher.spec.positions)
        return min((p for p in known if p), default=None)


def prepare_run(
    model: Student,
    teacher: str | PreTrainedModel | Teacher,
    objectives: Sequence[Objective],
    args: TrainingArguments,
    kwargs: Mapping[str, Any],
    *,
    adapter: PeftConfig | None = None,
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
    binding.check_optimizers(terms, kwargs.get("optimizers", (None, None)))
    if kwargs.get("eval_dataset") is not None or binding.reads_logits(terms):
        refuse_adapted_head(model, master.config, adapter)
    if terms and any(term.student.heads for term in terms.values()):
        _check_checkpointing(args)
    shift = _shift(model, master)
    filled = dict(kwargs)
    tokenizer = settle_tokenizers(model, master, student, filled.get("processing_class"))
    filled["processing_class"] = tokenizer
    positions = min((s.positions for s in (student, master.spec) if s.positions), default=None)
    seen: dict[str, Prepared] = {}
    collator = filled.get("data_collator")
    for name in ("train_dataset", "eval_dataset"):
        dataset, own = filled.get(name), collator is not None
        filled[name] = tokenised(dataset, tokenizer, positions, seen, name, keep_tokens=own)
    if collator is None:
        filled["data_collator"] = (
            Collator.of(tokenizer) if tokenizer is not None else Collator(pad_token_id=0)
        )
    run = Run(model, student, master, tuple(objectives), terms, shift, filled, seen)
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
    _check_sharding()
    if args.neftune_noise_alpha is not None:
        raise InputError("neftune_noise_alpha: the student's embeddings are read as they are")
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
    settle_best_metric(args, kwargs.get("eval_dataset"))
    loader: Any = args.accelerator_config
    if loader.dispatch_batches:
        raise InputError("dispatch_batches: rows are not cut up like [B, T] tensors; leave it out")
    loader.dispatch_batches = False


def _check_sharding() -> None:
    """Refuse what Accelerate's launcher asks for and this trainer cannot give.

    Raises:
        InputError: For ZeRO-3, for FSDP version 1, and for weights that only rank 0 loads.
    """
    if is_deepspeed_zero3_enabled():
        raise InputError(
            "DeepSpeed ZeRO-3 keeps the head's weight in pieces, which the loss reads whole; use "
            "FSDP2 (recipes/accelerate/fsdp2.yaml), or ZeRO-1 or 2"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "FSDP version 1 flattens the head's weight, which the loss reads; write fsdp_version: 2"
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise InputError(
            "fsdp_cpu_ram_efficient_loading leaves the teacher without weights on all ranks but "
            "the first; write fsdp_cpu_ram_efficient_loading: false"
        )


def _weights(model: object) -> nn.Module | None:
    """The loaded model behind a student or a teacher, adapters taken off."""
    inner = model.model if isinstance(model, Local) else model
    return plain(inner) if isinstance(inner, nn.Module) else None


def readable(example: Any, args: TrainingArguments) -> Any:  # noqa: ANN401  what a collator takes
    """An example without the columns that Trainer takes away."""
    if not args.remove_unused_columns or not isinstance(example, Mapping):
        return example
    return {key: example[key] for key in COLUMNS if key in example}


def _check_training_data(run: Run, args: TrainingArguments) -> None:
    """Refuse training data that the objectives or the collator have no use for.

    Raises:
        InputError: For several splits at once, labels that are missing or all masked, or nothing
            to calibrate on.
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
    batch = first_batch(
        run.collator,
        (readable(example, args) for example in first_of(dataset, CHECKED)),
        rows_needed=any(term.rows == "supervised" for term in run.terms.values()),
    )
    if batch is not None:
        _check_masked(run, batch)


def _check_masked(run: Run, batch: Mapping[str, Any]) -> None:
    """Refuse rows for masked models in which nothing is masked: each token would tell itself."""
    rows = batch["rows"]
    if not run.shift and len(rows) == batch["input_ids"].numel() and rows.labels.equal(rows.token):
        raise InputError(
            f"the student {run.student.name} is a masked language model and nothing in the "
            "training data is masked; give data_collator=DataCollatorForLanguageModeling(tokenizer)"
        )


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
                "activation_checkpointing_kwargs: {use_reentrant: false}"
            )
