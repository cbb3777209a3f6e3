"""What a run is made of, checked before weights load."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import HubStrategy

from llm_distill import binding, loading
from llm_distill.capture import Reader, predicts_next
from llm_distill.data import Collator, Data, prepare
from llm_distill.errors import InputError
from llm_distill.objectives import Evidence, Objective, QueryPlan, Term
from llm_distill.rows import Batch, RowCollator, sample_queries
from llm_distill.signals import ModelSpec, Request
from llm_distill.students import FromConfig, Student, as_local, student_spec
from llm_distill.teachers import Local, Source, Teacher
from llm_distill.vocabulary import settle_tokenizers

logger = logging.getLogger(__name__)

CALIBRATION_EXAMPLES = 32


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
        examples = list(
            itertools.islice(
                iter(cast("Iterable[Any]", self.kwargs["train_dataset"])), CALIBRATION_EXAMPLES
            )
        )
        collated = self.collator(examples)
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
    if isinstance(model, PreTrainedModel) and isinstance(master, Local) and master.model is model:
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
    for name in ("train_dataset", "eval_dataset"):
        filled[name] = _tokenised(filled.get(name), tokenizer, positions, reports, name)
    if filled.get("data_collator") is None:
        filled["data_collator"] = (
            Collator.of(tokenizer) if tokenizer is not None else Collator(pad_token_id=0)
        )
    return Run(model, student, master, tuple(objectives), terms, shift, filled, tuple(reports))


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
        raise InputError(
            f"hub_strategy {str(args.hub_strategy)!r} would upload optimizer states and "
            "projectors; write every_save or end"
        )
    # The filter reads every micro-batch's loss on the host, and hides what it finds.
    args.logging_nan_inf_filter = False
    if args.metric_for_best_model == "loss":
        # What transformers fills in where nothing was said; `eval_loss` says it explicitly.
        args.metric_for_best_model = "eval_kl"
    loader: Any = args.accelerator_config
    if loader.dispatch_batches is None:
        # Rows cannot be cut from one process's batch like [B, T] tensors.
        loader.dispatch_batches = False


def make_batch(
    collated: Mapping[str, Any],
    plan: QueryPlan | None,
    *,
    seed: int,
    epoch: int,
    keep: int | None = None,
) -> Batch:
    """What `RowCollator` made, as models and terms see it.

    Args:
        collated: Model inputs with `rows`, `valid` and `keys` beside them.
        plan: Which query rows to sample; None for none.
        seed: Of the run.
        epoch: Of the queries.
        keep: Only the rows of the first sequences count: the rest repeats others, to even out the
            ranks.
    """
    rows, valid, keys = collated["rows"], collated["valid"], collated["keys"]
    if keep is not None:
        rows = rows.first(keep)
        valid = None if valid is None else valid.first(keep)
    queries = None
    if plan is not None:
        among = rows if plan.rows == "supervised" else valid
        missing = len(keys) - len(among.per_sequence)
        among = replace(among, per_sequence=(*among.per_sequence, *[0] * missing))
        queries = sample_queries(among, keys, most=plan.most, seed=seed, epoch=epoch)
    inputs = {
        k: v
        for k, v in collated.items()
        if k not in ("rows", "valid", "keys", "labels", "num_items_in_batch")
    }
    batch = Batch(inputs, rows, valid, queries)
    return batch.to(rows.index.device)


def _tokenised(
    dataset: Any,  # noqa: ANN401  whatever Trainer takes
    tokenizer: PreTrainedTokenizerBase | None,
    positions: int | None,
    reports: list[str],
    name: str,
) -> Any:  # noqa: ANN401
    """`input_ids` and `labels` of a `datasets` object; anything else as it is."""
    import datasets

    if isinstance(dataset, Mapping):
        return {
            key: _tokenised(part, tokenizer, positions, reports, f"{name}[{key}]")
            for key, part in dataset.items()
        }
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise InputError(f"{name} is empty")
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset
    if tokenizer is None and "input_ids" not in (dataset.column_names or ()):
        raise InputError(
            f"{name} has the columns {dataset.column_names} and no tokenizer is known; give "
            "processing_class=tokenizer"
        )
    known = cast("PreTrainedTokenizerBase", tokenizer)  # not read for rows that are tokens already
    prepared = prepare(dataset, Data(max_length=None), known, max_positions=positions)
    reports.append(f"{name}: {prepared.report}")
    return prepared.train


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
