"""What the Hub gets: the plain student, its tokenizer, and a card with the facts of the run."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel

from llm_distill import schedules
from llm_distill.card import CardFacts, DataFacts, ModelFacts, ObjectiveFacts, origin_of
from llm_distill.objectives import named
from llm_distill.students import FromConfig, FromTeacher
from llm_distill.teachers import Cached

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import TrainerState, TrainingArguments

    from llm_distill.objectives import Objective, Term
    from llm_distill.signals import ModelSpec
    from llm_distill.students import Student
    from llm_distill.teachers import Teacher

PUBLISHED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "chat_template.jinja",
    "additional_chat_templates/*",
)
"""What of an output folder goes to the Hub. A list of what may, so that nothing else ever does."""

LIBRARIES = ("llm-distill", "torch", "transformers", "accelerate", "datasets", "peft")


def snapshot(folder: Path, inside: Path) -> Path:
    """The published files of a folder in one of their own, which outlives it: links where possible.

    Args:
        folder: A checkpoint, which `save_total_limit` may delete while it is being uploaded.
        inside: Where the new folder is made.
    """
    target = Path(tempfile.mkdtemp(prefix="_push-", dir=inside))
    for file in (file for pattern in PUBLISHED for file in folder.glob(pattern)):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, place)
    return target


def versions() -> dict[str, str]:
    """Python and the libraries of a run."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def model_facts(model: Student | Teacher, spec: ModelSpec, weights: nn.Module | None) -> ModelFacts:
    """Where a model came from, and its size where it is loaded whole."""
    size = None if weights is None else _parameters(weights)
    if isinstance(model, FromConfig):
        return ModelFacts(name=model.architecture, origin="random", parameters=size)
    if isinstance(model, FromTeacher):
        blocks = ", ".join(map(str, spec.blocks or ()))
        return ModelFacts(name=f"blocks {blocks}", origin="cut", parameters=size)
    config = getattr(model, "config", None)
    revision = cast("str | None", getattr(config, "_commit_hash", None))
    origin = origin_of(spec.name)
    if isinstance(model, Cached) and "/" not in spec.name:
        origin = "local"  # of a path its manifest has the last part
    return ModelFacts(name=spec.name, origin=origin, revision=revision, parameters=size)


def _parameters(weights: nn.Module) -> int:
    """How many a model has; those of four bits lie two in a byte."""
    if isinstance(weights, PreTrainedModel):
        return int(weights.num_parameters())
    return sum(p.numel() for p in weights.parameters())


def objective_facts(objectives: Sequence[Objective]) -> tuple[ObjectiveFacts, ...]:
    """Rows of the card's table of objectives."""
    return tuple(
        ObjectiveFacts(name, schedules.describe(o.weight), o.describe())
        for name, o in named(objectives).items()
    )


def layer_maps(terms: Mapping[str, Term]) -> str | None:
    """The tables of layers and what was decided at calibration, as printed before training."""
    parts = ["\n".join((name, *term.notes)) for name, term in terms.items() if term.notes]
    return "\n\n".join(parts) or None


def data_facts(dataset: object) -> DataFacts | None:
    """What a `datasets` object knows of itself; a recipe knows more (its Hub id or path).

    Returns:
        Facts of the first of several; None for none, or what is no `datasets` object.
    """
    if isinstance(dataset, Mapping) and dataset:
        name, first = next(iter(dataset.items()))
        known = data_facts(first)
        place = f"`{name}`, the first of {len(dataset)}"
        part = place if known is None or known.part is None else f"{place}: {known.part}"
        return known and replace(known, part=part)
    if not isinstance(dataset, Dataset | IterableDataset):
        return None
    split = None if dataset.split is None else f"split {dataset.split}"
    count = f"{len(dataset):,} examples" if isinstance(dataset, Dataset) else None
    return DataFacts(
        # The loaders of files carry the name of the file type.
        name=dataset.info.dataset_name or "a dataset made in Python",
        origin="local",
        part=", ".join(part for part in (split, count) if part) or None,
    )


def run_facts(
    args: TrainingArguments, state: TrainerState, *, student: nn.Module, data: DataFacts | None
) -> dict[str, Any]:
    """What the arguments and the log of a run tell."""
    best = state.best_global_step if _has_best(args, state) else None
    return {
        "data": data,
        "steps": state.global_step if best is None else best,
        "tokens": int(state.num_input_tokens_seen) or None,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "evaluation": _figures(state.log_history, best),
        "versions": versions(),
        "peft": isinstance(student, PeftModel),
    }


def _has_best(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the weights are those of the best checkpoint, as after a whole training."""
    done = any("train_loss" in log for log in state.log_history)
    return done and bool(args.load_best_model_at_end) and state.best_model_checkpoint is not None


def _figures(history: Sequence[Mapping[str, float]], best: int | None) -> dict[str, float]:
    """The last evaluation of the weights there are, of the first dataset where there are several.

    Args:
        history: What was logged.
        best: The step whose weights were loaded when the training was done; None: the last.
    """
    evaluations = [log for log in history if _prefix(log)]
    if best is not None:
        ends = [place for place, log in enumerate(history) if "train_loss" in log]
        evaluations = [log for log in history[ends[-1] :] if _prefix(log)] or [
            log for log in evaluations if log["step"] == best
        ]
    if not evaluations:
        return {}
    first = _prefix(evaluations[0])
    log = [log for log in evaluations if _prefix(log) == first][-1]
    return {
        key.replace(f"{first}_", "eval_", 1): float(value)
        for key, value in log.items()
        if key.startswith(f"{first}_")
    }


def _prefix(log: Mapping[str, float]) -> str:
    """`eval`, or `eval_name` for one of several datasets; empty where it is no evaluation."""
    found = (key for key in log if key.startswith("eval_") and key.endswith("_loss"))
    return next(found, "").removesuffix("_loss")


def name_of(args: TrainingArguments) -> str:
    """The student's own name: its Hub id, or the output folder."""
    return args.hub_model_id or Path(cast("str", args.output_dir)).absolute().name


__all__ = [
    "PUBLISHED",
    "CardFacts",
    "data_facts",
    "layer_maps",
    "model_facts",
    "name_of",
    "objective_facts",
    "run_facts",
    "versions",
]
