"""Small caches of a tiny teacher."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llm_distill import Cached, Local, Logits
from llm_distill.cache.estimator import Estimator
from llm_distill.cache.estimators import topk
from llm_distill.caching import Capture, write_cache
from llm_distill.preparation import prepare_run
from tests import tiny

TOP: Callable[[], Estimator] = partial(topk, k=16)


def capture(
    folder: Path,
    keep: Callable[[], Estimator] = TOP,
    *,
    shard_rows: int | None = 40,
    model: PreTrainedModel | None = None,
    **changes: Any,
) -> Capture:
    """A cache of 24 + 8 examples in several shards, before it is written."""
    rows = tiny.rows(32, empty=(3,))
    given: dict[str, Any] = {
        "train_dataset": rows.select(range(24)),
        "eval_dataset": rows.select(range(24, 32)),
        "processing_class": tiny.tokenizer(),
    }
    teacher = Local(tiny.llama("teacher") if model is None else model, tokenizer=tiny.tokenizer())
    args = tiny.arguments(folder / "out", per_device_eval_batch_size=4)
    run = prepare_run(tiny.llama("student"), teacher, [Logits()], args, given | changes)
    return Capture(run, Cached(str(folder / "cache"), of=teacher, keep=keep), args, shard_rows)


def written(folder: Path, keep: Callable[[], Estimator] = TOP, **changes: Any) -> str:
    """The same, written; its path."""
    made = capture(folder, keep, **changes)
    write_cache(made)
    return made.cached.path
