"""Training arguments that this trainer cannot work with, refused before weights load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy

from llm_distill import zero
from llm_distill.errors import InputError
from llm_distill.teachers import Ema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import Trainer, TrainingArguments

    from llm_distill.balance import Balance
    from llm_distill.objectives import Term
    from llm_distill.teachers import Teacher

ZERO3 = 3
"""The stage of DeepSpeed's ZeRO that keeps the student in pieces."""


def check_arguments(
    args: TrainingArguments, kwargs: Mapping[str, Any], *, spread: bool = False
) -> None:
    """Refuse arguments that cannot work, and set those whose default would hurt.

    Args:
        args: Of the training.
        kwargs: For `Trainer`.
        spread: Whether the teacher has a `device_map`, which may lie over several GPUs of one
            process: the student then trains on the first, and is not copied to the others.

    Raises:
        InputError: For several GPUs without a launcher, `model_init`, `compute_loss_func`, or a
            push of checkpoints.
    """
    _check_gpus(args, spread=spread)
    for name in ("model_init", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise InputError(
                f"DistillTrainer takes no {name}: the loss is the objectives', the student is "
                "`model`"
            )
    _check_sharding()
    _settle_deepspeed(args)
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
    loader: Any = args.accelerator_config
    if loader.dispatch_batches:
        raise InputError("dispatch_batches: rows are not cut up like [B, T] tensors; leave it out")
    loader.dispatch_batches = False


def _check_gpus(args: TrainingArguments, *, spread: bool) -> None:
    """Refuse several GPUs in one process, unless they are the teacher's."""
    if args.n_gpu > 1 and not spread:
        raise InputError(
            f"{args.n_gpu} GPUs are visible to one process; start one process for each: "
            f"accelerate launch --num_processes {args.n_gpu} your_script.py (or hide the others "
            "with CUDA_VISIBLE_DEVICES=0, or let the teacher lie on all of them: device_map: auto)"
        )
    args._n_gpu = min(args.n_gpu, 1)  # as Trainer itself does for a model that lies on several


def _check_sharding() -> None:
    """Refuse what Accelerate's launcher asks for and this trainer cannot give.

    Raises:
        InputError: For FSDP version 1, and for weights that only rank 0 loads.
    """
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


def _settle_deepspeed(args: TrainingArguments) -> None:
    """Make DeepSpeed's configuration say what these arguments say, where it says nothing.

    Raises:
        InputError: Where it says something else.
    """
    plugin: Any = args.deepspeed_plugin
    if plugin is None:
        return
    config: dict[str, Any] = plugin.hf_ds_config.config
    # Left out, it is a default of DeepSpeed's or Accelerate's, whatever was asked for.
    config.setdefault("gradient_clipping", args.max_grad_norm)
    stages = config.setdefault("zero_optimization", {})
    if stages.get("stage") == ZERO3:
        # Otherwise what is saved in the end is no model, and a warning is all there is to it.
        stages["stage3_gather_16bit_weights_on_model_save"] = True
    differing = zero.mismatches(config, args)
    if differing:
        raise InputError(
            f"DeepSpeed's configuration (ds) and the training arguments (hf) differ: "
            f"{'; '.join(differing)}; write auto for each in the configuration, or leave it out"
        )


def sharded_by(args: TrainingArguments) -> str | None:
    """What keeps the student in pieces on several ranks; None where each has all of it."""
    for name, variable, given in (
        ("FSDP", "ACCELERATE_USE_FSDP", args.fsdp_plugin_args),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", args.deepspeed),
    ):
        if given or os.environ.get(variable, "false").lower() in ("true", "1"):
            return name
    return None


def check_engine(args: TrainingArguments, running: Mapping[str, bool]) -> None:
    """Refuse a run in which Accelerate quietly took another engine than the one that was asked for.

    Args:
        args: What was asked for.
        running: By the names of `sharded_by`, what Accelerate runs.

    Raises:
        InputError: If they differ.
    """
    asked = sharded_by(args)
    if asked is None or running[asked]:
        return
    raise InputError(
        f"{asked} was asked for and Accelerate does not run it, as always on a CPU with FSDP: each "
        "process would have held the whole student; start it on GPUs, or with "
        "recipes/accelerate/ddp.yaml"
    )


def check_untrained(trainer: Trainer) -> None:
    """Refuse to train where DeepSpeed has made its engine, for an evaluation or a training.

    Raises:
        InputError: Saying when to evaluate.
    """
    if trainer.deepspeed is not None:
        raise InputError(
            "under DeepSpeed a trainer trains once, and before it evaluates; write eval_on_start: "
            "true to evaluate first, and make another trainer, of a model that is loaded anew, to "
            "train again"
        )


def check_checkpointing(args: TrainingArguments) -> None:
    """Refuse reentrant checkpointing with attention maps before weights load."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise InputError(
                "what reads attention has no gradient under reentrant gradient checkpointing; "
                "write activation_checkpointing_kwargs: {use_reentrant: false}"
            )


def idle_gates(terms: Mapping[str, Term], args: TrainingArguments) -> tuple[str, ...]:
    """What to tell of gates that see nothing.

    A compiled student has no hooks on its states, and DeepSpeed hands out copies of them.

    Args:
        terms: Under their names in the log.
        args: Whether the student is compiled.
    """
    gated = [name for name, term in terms.items() if term.factor() is not None]
    if not (gated and (args.torch_compile or zero.is_zero3())):
        return ()
    under = "torch_compile" if args.torch_compile else "DeepSpeed ZeRO-3"
    return (
        f"{', '.join(gated)}: under {under} the gate sees no gradients and stays open; let a "
        "hint end by its weight, such as {linear: {start: 1.0, end: 0.0, until: 0.6}}",
    )


def check_under_deepspeed(args: TrainingArguments, teacher: Teacher, balance: Balance) -> None:
    """Refuse what DeepSpeed's engine would quietly make useless.

    Args:
        args: Of the training.
        teacher: May be the student itself.
        balance: Between the terms.

    Raises:
        InputError: For a slow mean in halves, and for gradients at hidden states.
    """
    if zero.is_running() and isinstance(teacher, Ema) and (args.bf16 or args.fp16):
        raise InputError(
            "Ema: DeepSpeed keeps the mean in halves beside a student in halves, where it would "
            "not move; write bf16: false, or train with FSDP2 (recipes/accelerate/fsdp2.yaml)"
        )
    if zero.is_zero3() and balance.layer is not None:
        raise InputError(
            "balance: gradient reads gradients at a hidden state of the student, of which "
            "DeepSpeed ZeRO-3 hands out copies; write balance: normalised or uncertainty"
        )


def check_batches(terms: Mapping[str, Term], args: TrainingArguments) -> None:
    """Refuse batches in which a term that relates sequences never has enough of them.

    Raises:
        InputError: Naming the term, what it needs, and what there is.
    """
    for name, term in terms.items():
        size = args.train_batch_size * (args.world_size if term.gathers else 1)
        if term.least_sequences() > size:
            raise InputError(
                f"{name} compares {term.least_sequences()} sequences or more with each other, and "
                f"per_device_train_batch_size is {size}: it would never count; write "
                f"{term.least_sequences()} or more, or items: token"
            )
