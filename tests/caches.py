"""Small caches of a tiny teacher."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llm_distill import Cached, Local, Logits
from llm_distill.cache.estimator import Estimator
from llm_distill.cache.estimators import topk
from llm_distill.caching import Capture, write_cache
from llm_distill.objectives import Objective
from llm_distill.preparation import prepare_run
from tests import tiny

TOP: Callable[[], Estimator] = partial(topk, k=16)


def capture(
    folder: Path,
    keep: Callable[[], Estimator] = TOP,
    *,
    shard_rows: int | None = 40,
    model: PreTrainedModel | None = None,
    hints: Sequence[Objective] = (),
    width: int | None = None,
    **changes: Any,
) -> Capture:
    """A cache of 24 + 8 examples in several shards, before it is written.

    Args:
        folder: It is in `cache` there.
        keep: Of the logits.
        shard_rows: Of a shard.
        model: The teacher.
        hints: Objectives whose hidden states are kept as well.
        width: Directions of them.
        changes: Of what Trainer is given, and of the student.
    """
    rows = tiny.rows(32, empty=(3,))
    given: dict[str, Any] = {
        "train_dataset": rows.select(range(24)),
        "eval_dataset": rows.select(range(24, 32)),
        "processing_class": tiny.tokenizer(),
    }
    teacher = Local(tiny.llama("teacher") if model is None else model, tokenizer=tiny.tokenizer())
    args = tiny.arguments(folder / "out", per_device_eval_batch_size=4)
    given |= changes
    student = given.pop("student", None) or tiny.llama("student")
    run = prepare_run(student, teacher, [*hints, Logits()], args, given)
    cached = Cached(
        str(folder / "cache"), of=teacher, keep=keep, states=bool(hints), states_width=width
    )
    return Capture(run, cached, args, shard_rows)


def written(folder: Path, keep: Callable[[], Estimator] = TOP, **changes: Any) -> str:
    """The same, written; its path."""
    made = capture(folder, keep, **changes)
    write_cache(made)
    return made.cached.path
