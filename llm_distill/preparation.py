"""What a run is made of, checked before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_distill import binding, hints, mapping, recall
from llm_distill.arguments import (
    check_arguments,
    check_batches,
    check_checkpointing,
    idle_gates,
)
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator, first_batch
from llm_distill.data import Collator, Prepared
from llm_distill.data.given import first_of, tokenised
from llm_distill.errors import InputError
from llm_distill.evaluation import OWN, settle_best_metric
from llm_distill.objectives import MEASURES, Objective, Term
from llm_distill.routing import check_routes
from llm_distill.signals import ModelSpec, Request
from llm_distill.students import (
    Student,
    both_causal,
    refuse_adapted_head,
    student_spec,
    teacher_for,
)
from llm_distill.teachers import (
    DeepToShallow,
    Itself,
    Local,
    Teacher,
    columns_of,
    cut,
    has_device_map,
)
from llm_distill.vocabulary import Tokenizers, check_alignment, settle_tokenizers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainingArguments

__all__ = ["Run", "make_batch", "prepare_run"]

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
        told: What was decided before the training, besides the terms' own notes.
        tokenizers: Of both models.
    """

    model: Student
    student: ModelSpec
    teacher: Teacher
    objectives: tuple[Objective, ...]
    terms: Mapping[str, Term]
    shift: bool
    kwargs: dict[str, Any]
    prepared: Mapping[str, Prepared] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    tokenizers: Tokenizers = field(default_factory=Tokenizers)

    @property
    def teacher_request(self) -> Request:
        """What the teacher has to give; its logits as well for an evaluation that compares them."""
        asked = self._evaluates and self.compares
        return binding.teacher_request(self.terms) | Request(logits=asked)

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of `MEASURES` that an evaluation takes."""
        if self.teacher_request.logits and self.compares:
            return MEASURES
        return OWN if self._evaluates else ()

    @property
    def compares(self) -> bool:
        """Whether the logits of two models can be compared token by token."""
        return _compares(self.tokenizers, self.teacher)

    @property
    def _evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.kwargs.get("eval_dataset") is not None

    @property
    def opening_request(self) -> Request:
        """What the teacher may be asked for: in the training, and before it by what data decide."""
        specs, compared = (self.student, self.teacher.spec), self._evaluates and self.compares
        return binding.opening_request(self.objectives, self.terms, specs, compared=compared)

    @property
    def collator(self) -> RowCollator:
        """The user's collator, with rows, and the same text for the teacher where it is needed."""
        retold = None
        if self.opening_request != Request():
            retold = self.tokenizers.translator(self.teacher.spec)
        return RowCollator(
            self.kwargs["data_collator"],
            shift=self.shift,
            valid=binding.needs_valid(self.terms) or hints.keeps_valid(self.teacher),
            positions=self.tokenizers.positions(self.student, self.teacher.spec),
            theirs=None if retold is None else RowCollator(retold, shift=self.shift, valid=True),
            named=bool(recall.caches(self.teacher)),
            lookup=hints.lookup_of(self.teacher, self.opening_request),
            columns=self.columns,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that the teacher reads beside the tokens."""
        return columns_of(self.teacher)


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
    spec = teacher if isinstance(teacher, Itself | Teacher) else Local(teacher)
    check_arguments(args, kwargs, spread=has_device_map(spec))
    master = teacher_for(model, spec, adapter)
    student = student_spec(model, master.config)
    master = cut(master, min(student.vocabulary, master.spec.vocabulary))
    given, objectives = objectives, hints.ready(objectives, student, master)
    terms = binding.bind(objectives, student, master.spec, seed=args.seed)
    binding.check_itself(master, objectives, terms)
    binding.check_optimizers(terms, kwargs.get("optimizers", (None, None)))
    hints.check(master, objectives, terms, student)
    if kwargs.get("eval_dataset") is not None or binding.reads_logits(terms):
        refuse_adapted_head(model, master.config, adapter)
    if terms and any(term.student.heads for term in terms.values()):
        check_checkpointing(args)
    if kwargs.get("train_dataset") is not None:
        check_batches(terms, args)
    shift = both_causal(model, master)
    filled = dict(kwargs)
    found = settle_tokenizers(model, master, student, filled.get("processing_class"))
    check_alignment(found, objectives, terms, causal=shift)
    settle_best_metric(
        args,
        filled.get("eval_dataset"),
        compared=_compares(found, master),
        itself=isinstance(master, Itself),
    )
    filled["processing_class"] = found.ours
    seen = _fill_data(filled, master, found.positions(student, master.spec))
    run = Run(
        model,
        student,
        master,
        tuple(objectives),
        terms,
        shift,
        filled,
        seen,
        (*found.told, *_told(student, master, given, objectives), *idle_gates(terms, args)),
        found,
    )
    _check_training_data(run, args)
    master.check(run.opening_request, args.device)
    return run


def _fill_data(
    filled: dict[str, Any], master: Teacher, positions: int | None
) -> dict[str, Prepared]:
    """Datasets as tokens and a collator, in the place of what was given; what became of the rows.

    Raises:
        InputError: For data of no use, or that do not say which teacher is theirs.
    """
    seen: dict[str, Prepared] = {}
    tokenizer, collator = filled["processing_class"], filled.get("data_collator")
    for name in ("train_dataset", "eval_dataset"):
        dataset, own = filled.get(name), collator is not None
        check_routes(master, dataset, name)
        keep = columns_of(master)
        filled[name] = tokenised(
            dataset, tokenizer, positions, seen, name, keep_tokens=own, keep=keep
        )
    if collator is None:
        filled["data_collator"] = (
            Collator.of(tokenizer) if tokenizer is not None else Collator(pad_token_id=0)
        )
    return seen


def _compares(found: Tokenizers, teacher: Teacher) -> bool:
    """Whether there are logits of two models, of the same tokens."""
    return found.theirs is None and not isinstance(teacher, DeepToShallow)


def _told(
    student: ModelSpec,
    teacher: Teacher,
    given: Sequence[Objective],
    objectives: Sequence[Objective],
) -> tuple[str, ...]:
    """What was settled without being asked for."""
    said = [*recall.told(teacher, objectives)]
    if student.blocks is not None:
        blocks = ", ".join(map(str, student.blocks))
        said.append(f"student: blocks {blocks} of the {teacher.spec.depth} of {teacher.spec.name}")
    return (*said, *mapping.told_fading(given, objectives))


def readable(
    example: Any,  # noqa: ANN401  what a collator takes
    args: TrainingArguments,
    columns: Sequence[str] = (),
) -> Any:  # noqa: ANN401  the same
    """An example without the columns that Trainer takes away; some stay besides."""
    if not args.remove_unused_columns or not isinstance(example, Mapping):
        return example
    return {key: example[key] for key in (*COLUMNS, *columns) if key in example}


def _check_training_data(run: Run, args: TrainingArguments) -> None:
    """Refuse data that the objectives, the collator or a cached teacher have no use for.

    Raises:
        InputError: For several splits at once, labels that are missing or all masked, nothing to
            calibrate on, or examples that are not in the cache.
    """
    dataset = run.kwargs.get("train_dataset")
    if isinstance(dataset, Mapping):
        raise InputError(
            f"train_dataset is a {type(dataset).__name__} of {sorted(dataset)}; give one of them"
        )
    needing = [objective for objective in run.objectives if objective.needs_data]
    surveyed = binding.survey(needing, run.student, run.teacher.spec)
    if dataset is None and surveyed != (Request(), Request()):
        raise InputError(
            "there is no train_dataset to calibrate on; give one, or write init: random and heads: "
            "mean or group"
        )
    datasets = {name: run.kwargs.get(name) for name in ("train_dataset", "eval_dataset")}
    read = partial(readable, args=args, columns=run.columns)
    recall.check_data(run.teacher, run.kwargs["processing_class"], datasets, run.collator, read)
    batch = first_batch(
        run.collator,
        map(read, first_of(dataset, CHECKED)),
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
