"""`DistillTrainer`: a `transformers.Trainer` whose loss comes from objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from llm_distill import binding, schedules
from llm_distill.calibration import calibrate
from llm_distill.checkpointing import StudentTrainer
from llm_distill.distiller import Distiller
from llm_distill.evaluation import Tally, evaluation_metrics, own_sequences
from llm_distill.ledger import AfterStep, Ledger, Ranks, logs_next
from llm_distill.objectives import MEASURES, CrossEntropy, Logits, Objective
from llm_distill.preparation import COLUMNS, make_batch, prepare_run
from llm_distill.rows import Batch, Step
from llm_distill.signals import Request, Signals
from llm_distill.students import Student, load_student

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

    from llm_distill.teachers import Teacher

DEFAULT_OBJECTIVES = (CrossEntropy(weight=0.1), Logits())


class DistillTrainer(StudentTrainer):
    """Distil a teacher into a student.

    A Trainer in every other respect: callbacks, `compute_metrics`, `optimizers`, checkpoints and
    pushing work as there.

    Args:
        model: The student: a loaded model, a Hub id or path (fp32 master weights), or a spec
            (`FromConfig`, `Local`).
        teacher: A loaded model, a Hub id or path, or a spec (`Local`).
        objectives: What to match; by default cross-entropy (0.1) and forward KL on the logits.
        args: As for Trainer.
        peft_config: Train an adapter on the student instead of all its weights.
        rows_per_chunk: Rows whose logits exist at a time; by default as many as keep the matrix
            products fast and the memory allows.
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
        **trainer_kwargs: Any,
    ) -> None:
        args = args if args is not None else TrainingArguments("tmp_trainer")
        objectives = DEFAULT_OBJECTIVES if objectives is None else objectives
        chunk = binding.checked_rows(rows_per_chunk)
        run = prepare_run(model, teacher, objectives, args, trainer_kwargs, adapter=peft_config)
        student: nn.Module = load_student(model, run.teacher.config)
        if peft_config is not None:
            student = cast(
                "nn.Module", get_peft_model(cast("PreTrainedModel", student), peft_config)
            )
        self._source = run.teacher.open(run.teacher_request, args.device)
        self.run = run = calibrate(run, student, self._source, args)
        distiller = Distiller(student, run.terms, run.student.name, rows_per_chunk=chunk)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = not distiller.request.logits
        use_cache = distiller.config.use_cache
        super().__init__(
            model=cast("PreTrainedModel", distiller),
            args=args,
            **(run.kwargs | {"data_collator": run.collator}),
        )
        distiller.config.use_cache = use_cache  # Trainer's is for training, the config is for users
        self.model_accepts_loss_kwargs = True  # so that the items of a step are counted before it
        self.label_names = ["labels"]
        self._keep_fp32_where_it_counts()
        self._plan = binding.query_plan(run.terms)
        self._compares = binding.teacher_request(run.terms).logits
        decode = getattr(self.processing_class, "decode", None)
        ranks = Ranks(args.device, self._over_ranks, self.accelerator.gather, decode)
        self._ledger = Ledger(run.terms, ranks)
        self.add_callback(AfterStep(self._ledger))
        self._evaluated = Tally((*run.terms, *MEASURES), args.device)

    @property
    def _ranks(self) -> int:
        """Data-parallel ranks: their gradients are averaged."""
        return int(self.accelerator.num_processes // self.get_tp_size())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer; rank 0 shows objectives and layer maps before, counts of streams after.

        Raises:
            FloatingPointError: At the first log, or at the end, after a row whose loss is no
                number or infinite.
        """
        prepared = self.run.prepared.items()
        table = binding.describe(self.run.objectives, self.run.terms)
        self._announce(*(f"{name}: {found.report}" for name, found in prepared), table)
        self._ledger.reset()  # steps after the last log of another training
        output: TrainOutput = super().train(*args, **kwargs)
        self._ledger.check()  # steps after the last log
        counted = ((name, found.counter) for name, found in prepared)
        self._announce(*(f"{name}, read: {c.report()}" for name, c in counted if c is not None))
        return output

    def _announce(self, *lines: str) -> None:
        """Show lines on rank 0, unless somebody else tells them."""
        if lines and self.announces and self.is_world_process_zero():
            Console(stderr=True, highlight=False).print("\n".join(lines), markup=False)

    # A step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; the attention taps forget the batch, also where the step was cut short."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            self.distiller.release()
        return loss

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
        done = self.state.global_step
        progress = done / max(self.state.max_steps, 1)
        shares = self._weights(progress) * self._ranks / items.clamp_min(1.0)
        measure = self._compares and logs_next(self.args, self.state)
        outcome = model(batch, self._taught(batch), Step(progress, shares, measure=measure))
        self._ledger.add(outcome, counts, len(batch.supervised), items=items, step=done + 1)
        loss = outcome.loss
        return (loss, {"loss": loss, "sums": outcome.sums}) if return_outputs else loss

    def _taught(self, batch: Batch) -> Signals:
        """What the teacher says; it does not run where no term listens, as under cross-entropy."""
        if binding.teacher_request(self.run.terms) == Request():
            return Signals(f"teacher {self.run.teacher.spec.name}")
        return self._source(batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As in Trainer; where a stream ends inside a step, batches without rows fill the step up.

        Trainer would not take it, and add its gradient to that of the next one.
        """
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            samples += [self._silent(samples[-1])] * (num_batches - len(samples))
        return samples, items

    def _silent(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of which nothing counts."""
        given = {key: value for key, value in inputs.items() if key != "batch"}
        return given | {"batch": make_batch(given, self._plan, seed=0, epoch=0, keep=0)}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Items of each term in the micro-batches of a step, over all ranks: `[K]`."""
        del device
        return self._summed([self._batch(inputs) for inputs in batch_samples])

    def _summed(self, batches: Sequence[Batch]) -> Tensor:
        """Items of each term over batches and ranks."""
        totals = [sum(column) for column in zip(*map(self._counts, batches), strict=True)]
        totals = totals or [0] * len(self.run.terms)
        return self._over_ranks(self._sent(totals))

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        return cast("Tensor", self.accelerator.reduce(values, reduction="sum"))

    def _counts(self, batch: Batch) -> list[int]:
        """Items of each term in this batch."""
        return [term.count(batch) for term in self.run.terms.values()]

    def _weights(self, progress: float) -> Tensor:
        """Weight of each term: `[K]`."""
        return self._sent([schedules.at(o.weight, progress) for o in self.run.objectives])

    def _sent(self, numbers: Sequence[float]) -> Tensor:
        """Numbers of the host on the device, without waiting for it."""
        return torch.tensor(numbers, dtype=torch.float32).to(self.args.device, non_blocking=True)

    def _batch(self, inputs: dict[str, Any]) -> Batch:
        """The training batch in what the row collator made, kept beside it."""
        if "batch" not in inputs:
            epoch = int(self.state.epoch or 0)
            inputs["batch"] = make_batch(inputs, self._plan, seed=self.args.seed, epoch=epoch)
        return cast("Batch", inputs["batch"])

    # Logging and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with the unweighted mean of each term beside the training loss."""
        if "loss" in logs:
            logs |= self._ledger.report()
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
        shares = self._weights(1.0) / self._sent(counts).clamp_min(1.0)
        measure = self.run.teacher_request.logits
        step = Step(1.0, shares, measure=measure, logits=not prediction_loss_only)
        try:
            loss, sums, _, logits = model(batch, self._source(batch), step)
        finally:
            self.distiller.release()  # else the student could not generate afterwards
        measured = [len(batch.supervised) if measure else 0] * len(MEASURES)
        if not measure:
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
        self._signature_columns: Any = list(COLUMNS)
