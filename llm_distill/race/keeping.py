"""What a race came to, kept beside the run and read at the next start of the same one."""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from llm_distill import surveying
from llm_distill.layers import LayerMap, Row
from llm_distill.preparation import readable
from llm_distill.race.halving import Arm, Result

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn
    from transformers import TrainingArguments

    from llm_distill.preparation import Run

FILE = "race.json"

EXAMPLES = 8
"""Of the training data, by which other data are told."""

ARGUMENTS = (
    "seed",
    "data_seed",
    "full_determinism",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "fp16",
    "tf32",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "remove_unused_columns",
)
"""Training arguments that change what a race comes to."""

NAMELESS = re.compile(r"<lambda>|<locals>|object at 0x")
"""In what describes a recipe: nothing tells these from others at the next start."""


def key_of(
    run: Run, student: nn.Module, args: TrainingArguments, recipe: Sequence[object]
) -> str | None:
    """What a race depends on.

    Args:
        run: Models, objectives and data.
        student: Its adapters.
        args: Of the run.
        recipe: Whatever else counts.

    Returns:
        None where a model was given loaded, or a function has no name: nothing tells them from
        others.
    """
    stamps = surveying.stamp(run.teacher), surveying.stamp(run.model)
    dataset: Any = run.kwargs.get("train_dataset")
    told = repr(
        (
            stamps,
            run.objectives,
            run.kwargs.get("data_collator"),
            run.kwargs.get("optimizer_cls_and_kwargs"),
            [(name, getattr(args, name, None)) for name in ARGUMENTS],
            _adapters(student),
            *recipe,
        )
    )
    if None in stamps or NAMELESS.search(told):
        return None
    examples = [readable(example, args, run.columns) for example in islice(iter(dataset), EXAMPLES)]
    size = len(dataset) if hasattr(dataset, "__len__") else None
    plain = re.sub(r" at 0x[0-9a-f]+", "", told)  # where functions lie in memory
    return str(zlib.crc32(repr((plain, size, examples)).encode()))


def read(place: Path, key: str | None) -> tuple[Arm, tuple[Result, ...]] | None:
    """The race of an earlier start; None where there is none, another one, or half of one."""
    if key is None:
        return None
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
        if document["key"] != key:
            return None
        results = tuple(
            Result(_arm(entry["arm"]), int(entry["steps"]), _number(entry["kl"]))
            for entry in document["results"]
        )
        return _arm(document["winner"]), results
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(place: Path, key: str, winner: Arm, results: Sequence[Result]) -> None:
    """A race beside the run, whole or not at all."""
    document = {
        "key": key,
        "winner": asdict(winner),
        "results": [
            {"arm": asdict(r.arm), "steps": r.steps, "kl": r.kl if math.isfinite(r.kl) else None}
            for r in results
        ],
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    half = place.with_suffix(".part")
    half.write_text(json.dumps(document, indent=1), encoding="utf-8")
    half.replace(place)


def _number(said: float | None) -> float:
    """A figure from JSON, which has no NaN."""
    return math.nan if said is None else float(said)


def _arm(said: dict[str, Any]) -> Arm:
    """An arm from JSON."""
    mapping = said["mapping"]
    if mapping is not None:
        rows = tuple(
            Row(
                row["student"], tuple((int(t), share) for t, share in row["teacher"]), row["weight"]
            )
            for row in mapping["rows"]
        )
        evidence = tuple((what, figure) for what, figure in mapping["evidence"])
        mapping = LayerMap(**{**mapping, "rows": rows, "evidence": evidence})
    return Arm(**{**said, "mapping": mapping})


def _adapters(student: nn.Module) -> object:
    """The settings of a student's adapters, in the same order at every start."""
    if not isinstance(student, PeftModel):
        return None
    return {
        name: sorted(
            (key, sorted(value, key=str) if isinstance(value, set) else value)
            for key, value in config.to_dict().items()
        )
        for name, config in student.peft_config.items()
    }
