"""`DistillTrainer`: a `transformers.Trainer` whose loss comes from objectives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from llm_distill import added_kl, binding, race, refreshing, schedules
from llm_distill.arguments import check_engine, check_under_deepspeed, check_untrained
from llm_distill.balance.base import settle
from llm_distill.calibration import calibrate
from llm_distill.distiller import Distiller
from llm_distill.evaluation import Tally, evaluation_metrics, own_sequences
from llm_distill.following import Follow
from llm_distill.ledger import AfterStep, Ledger, Ranks, logs_next
from llm_distill.objectives import MEASURES, CrossEntropy, Logits, Objective
from llm_distill.preparation import COLUMNS, make_batch, prepare_run
from llm_distill.rows import Step
from llm_distill.steps import StepTrainer
from llm_distill.students import Student, load_student
from llm_distill.teachers import Itself, Local, Within
from llm_distill.weighing import Weighing, sent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

    from llm_distill.balance import BalanceRule
    from llm_distill.preparation import Run
    from llm_distill.teachers import Source, Teacher

DEFAULT_OBJECTIVES = (CrossEntropy(weight=0.1), Logits())


class DistillTrainer(StepTrainer):
    """Distil a teacher into a student.

    A Trainer in every other respect: callbacks, `compute_metrics`, `optimizers`, checkpoints and
    pushing work as there.

    Args:
        model: The student: a loaded model, a Hub id or path (fp32 master weights), or a spec
            (`FromConfig`, `FromTeacher`, `Local`).
        teacher: A loaded model, a Hub id or path, or a spec (`Local`, `Cached`, `Remote`,
            `Ensemble`, `Routed`, or one that is the student itself: `BornAgain`, `Ema`,
            `AdapterOff`, `DeepToShallow`).
        objectives: What to match; by default cross-entropy (0.1) and forward KL on the logits.
        args: As for Trainer.
        peft_config: Train an adapter on the student instead of all its weights.
        rows_per_chunk: Rows whose logits exist at a time; by default as many as keep the matrix
            products fast and the memory allows.
        balance: Between the weights of the objectives (`llm_distill.balance`: `normalised`,
            `uncertainty`, `gradient`); by default they stay as written.
        trainer_kwargs: Everything else that Trainer takes; `processing_class` is the student's
            tokenizer by default, `data_collator` one that pads `input_ids` and `labels`.

    Attributes:
        announces: Whether `train` shows the table of objectives, and what became of the data.

    Raises:
        InputError: For anything that cannot work, before weights load.
    """

    loss_is_scaled_for_ga = True
    announces = True

    def __init__(
        self,
        model: Student,
        teacher: str | PreTrainedModel | Teacher,
        objectives: Sequence[Objective] | None = None,
        args: TrainingArguments | None = None,
        *,
        peft_config: PeftConfig | None = None,
        rows_per_chunk: int | None = None,
        balance: BalanceRule | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        args = args if args is not None else TrainingArguments("tmp_trainer")
        objectives = DEFAULT_OBJECTIVES if objectives is None else objectives
        chunk = binding.checked_rows(rows_per_chunk)
        run = prepare_run(model, teacher, objectives, args, trainer_kwargs, adapter=peft_config)
        check_under_deepspeed(args, run.teacher, settle(balance, run.terms, run.student.depth))
        refreshing.check(run, args)
        race.check(run, args, balance)  # all this before weights load
        student: nn.Module = load_student(model, run.teacher)
        if peft_config is not None:
            student = cast(
                "nn.Module", get_peft_model(cast("PreTrainedModel", student), peft_config)
            )
        self._source, self.quantised = _opened(run, student, args)
        run = replace(run, told=(*run.told, *self._source.told, *self.quantised))
        make = partial(DistillTrainer, rows_per_chunk=chunk, balance=balance)
        asked, run = run, calibrate(run, student, self._source, args, make)
        self.run = run
        distiller = Distiller(
            student,
            run.terms,
            run.student.name,
            rows_per_chunk=chunk,
            balance=settle(balance, run.terms, run.student.depth),
            within=self._source if isinstance(self._source, Within) else None,
        )
        given, use_cache = args.ddp_find_unused_parameters, distiller.config.use_cache
        if given is None:
            alone = distiller.forcing is not None  # without the head, for a while
            args.ddp_find_unused_parameters = alone or not distiller.request.logits
        super().__init__(
            model=cast("PreTrainedModel", distiller),
            args=args,
            **(run.kwargs | {"data_collator": run.collator}),
        )
        check_engine(args, {"FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled})
        args.ddp_find_unused_parameters = given  # the next trainer's may be others
        distiller.config.use_cache = use_cache  # Trainer's is for training, the config is for users
        self.model_accepts_loss_kwargs = True  # so that the items of a step are counted before it
        self.label_names = ["labels"]
        self._keep_fp32_where_it_counts()
        self._plan = binding.query_plan(run.terms)
        self._compares = binding.teacher_request(run.terms).logits and run.compares
        decode = getattr(self.processing_class, "decode", None)
        ranks = Ranks(args.device, self._over_ranks, self.accelerator.gather, decode)
        self._weighing = Weighing(run.objectives, run.terms, distiller.balance, args.device)
        self._ledger = Ledger(run.terms, ranks, distiller.balance)
        self._add_callbacks(asked)
        self._evaluated = Tally((*run.terms, *MEASURES), args.device)

    def _add_callbacks(self, asked: Run) -> None:
        """What follows a step; `asked` is the run before data decided its maps."""
        self.add_callback(AfterStep(self._ledger))
        if self.distiller.within is not None and self.distiller.within.follows:
            self.add_callback(Follow(self.distiller))
        if refreshing.follows(asked.objectives):
            given = asked, self.run, self.distiller.student, self._source
            self.add_callback(refreshing.Refresh(*given, self._show))

    @property
    def _ranks(self) -> int:
        """Data-parallel ranks: their gradients are averaged."""
        return int(self.accelerator.num_processes // self.get_tp_size())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer; rank 0 shows objectives and layer maps before, counts of streams after.

        Raises:
            FloatingPointError: At the first log, or at the end, after a row whose loss is no
                number or infinite.
            InputError: Under DeepSpeed, after an evaluation or another training.
        """
        check_untrained(self)
        prepared = self.run.prepared.items()
        table = binding.describe(self.run.objectives, self.run.terms)
        reports = (f"{name}: {found.report}" for name, found in prepared)
        balance = self.distiller.balance.describe()
        weights = [f"balance: {balance}"] if balance else []
        self._announce(*reports, *self.run.told, table, *weights)
        self._ledger.reset()  # steps after the last log of another training
        for _, found in prepared:
            if found.counter is not None:
                found.counter.reset()
        output: TrainOutput = super().train(*args, **kwargs)
        self._ledger.check()  # steps after the last log
        counted = ((name, found.counter) for name, found in prepared)
        self._announce(*(f"{name}, read: {c.report()}" for name, c in counted if c is not None))
        return output

    def _announce(self, *lines: str) -> None:
        """Show lines on rank 0, unless somebody else tells them."""
        if self.announces:
            self._show(*lines)

    def _show(self, *lines: str) -> None:
        """Show lines on rank 0."""
        if lines and self.is_world_process_zero():
            told = Console(stderr=True, highlight=False)
            told.print("\n".join(lines), markup=False, soft_wrap=True)

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002  Trainer's signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401  Trainer's signature
        """Loss of one micro-batch: its share of the whole step's mean, times the ranks.

        Args:
            model: The wrapped distiller.
            inputs: What the row collator made.
            return_outputs: Also return the sums of the terms.
            num_items_in_batch: `[K]`, items of each term in the whole step over all ranks; this
                batch alone where it is absent.
        """
        batch = self._batch(inputs)
        counts = self._counts(batch)
        if num_items_in_batch is None:
            num_items_in_batch = self._summed([batch])
        items = cast("Tensor", num_items_in_batch)
        progress, number = self._progress, self.state.global_step + 1
        weights = self._weighing.now(progress, balanced=not self._alone)
        shares = weights * self._ranks / items.clamp_min(1.0)
        measure = self._compares and logs_next(self.args, self.state) and not self._alone
        step = Step(progress, shares, measure=measure, alone=self._alone)
        outcome = model(batch, self._taught(batch), step)
        self._ledger.skip([term.skipped(batch) for term in self.run.terms.values()])
        self._ledger.add(outcome, counts, len(batch.supervised), items=items, step=number)
        loss = outcome.loss
        return (loss, {"loss": loss, "sums": outcome.sums}) if return_outputs else loss

    # Logging and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with the mean of each term and each weight that moves beside the loss."""
        if "loss" in logs:
            logs |= self._ledger.report() | self._weighing.shown()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, with exact token means, perplexities, KL and agreement."""
        self._evaluated.reset()
        output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        means = self._evaluated.means(self._over_ranks)
        weights = [schedules.at(o.weight, 1.0) for o in self.run.objectives]
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = evaluation_metrics(means, dict(zip(self.run.terms, weights, strict=True)), prefix)
        cast("dict[str, float]", output.metrics).update(metrics)
        return output

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001  Trainer's signature
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """One evaluation batch, with the weights at the end of their schedules."""
        del ignore_keys
        inputs = self._prepare_inputs(inputs)
        keep = own_sequences(self.accelerator, len(inputs["input_ids"]))
        batch = make_batch(inputs, self._plan, seed=self.args.seed, epoch=0, keep=keep)
        counts = self._counts(batch)
        items = sent(counts, self.args.device)
        shares = self._weighing.written(1.0) / items.clamp_min(1.0)
        told = self.run.measured
        step = Step(1.0, shares, measure=bool(told), logits=not prediction_loss_only)
        try:
            heard = self._taught(batch, self.run.teacher_request)
            loss, sums, _, logits = model(batch, heard, step)
        finally:
            self.distiller.release()  # else the student could not generate afterwards
        measured = [len(batch.supervised) if name in told else 0 for name in MEASURES]
        if not told:
            sums = torch.cat([sums, sums.new_zeros(len(MEASURES))])
        self._evaluated.add(sums, [*counts, *measured])
        return loss, logits, None if prediction_loss_only else inputs["labels"]

    # Fitting into Trainer

    def _keep_fp32_where_it_counts(self) -> None:
        """Under FSDP2 in bf16, do not round the shares, the teacher's signals, or the loss."""
        if not self.is_fsdp_enabled or not self.args.bf16:
            return
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the collator reads, not those of the wrapper's signature."""
        self._signature_columns: Any = [*COLUMNS, *self.run.columns]


def _opened(
    run: Run, student: nn.Module, args: TrainingArguments
) -> tuple[Source, tuple[str, ...]]:
    """The teacher at work, and what quantising it adds, in words.

    One that is the student itself is made of what was loaded.
    """
    teacher, request = run.teacher, run.opening_request
    if isinstance(teacher, Itself):
        teacher = teacher.of(Local(cast("PreTrainedModel", student)))
    make = partial(teacher.open, request, args.device)
    source, added = added_kl.opened(make, run, args, compared=request.logits)
    return source, tuple(map(str, added))
