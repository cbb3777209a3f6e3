"""What the Hub gets: the plain student, its tokenizer, and a card with the facts of the run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, IterableDataset
from peft import PeftModel

from llm_distill import schedules
from llm_distill.card import CardFacts, DataFacts, ModelFacts, ObjectiveFacts, origin_of
from llm_distill.objectives import named
from llm_distill.students import FromConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def versions() -> dict[str, str]:
    """Python and the libraries of a run."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def model_facts(model: Student | Teacher, spec: ModelSpec, weights: nn.Module | None) -> ModelFacts:
    """Where a model came from, and its size where it is loaded whole."""
    size = None if weights is None else sum(p.numel() for p in weights.parameters())
    if isinstance(model, FromConfig):
        return ModelFacts(name=model.architecture, origin="random", parameters=size)
    config = getattr(model, "config", None)
    revision = cast("str | None", getattr(config, "_commit_hash", None))
    return ModelFacts(
        name=spec.name, origin=origin_of(spec.name), revision=revision, parameters=size
    )


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
        None for several datasets, none, or what is no `datasets` object.
    """
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
    evaluations = [log for log in state.log_history if "eval_loss" in log]
    figures = {k: v for k, v in (evaluations[-1] if evaluations else {}).items() if k != "epoch"}
    return {
        "data": data,
        "steps": state.global_step,
        "tokens": int(state.num_input_tokens_seen) or None,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "evaluation": {k: float(v) for k, v in figures.items() if k != "step"},
        "versions": versions(),
        "peft": isinstance(student, PeftModel),
    }


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
