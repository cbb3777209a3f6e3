"""DeepSpeed's configuration, which transformers keeps for the whole process while it is alive.

Under ZeRO-3 every model that transformers loads or makes is emptied at once, whoever it is for.
What is loaded here is whole, or in pieces of its own: no order of arguments and models is to be
known.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.integrations import deepspeed as hf_deepspeed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import TrainingArguments


def is_running() -> bool:
    """Whether this run was started under DeepSpeed."""
    return hf_deepspeed.deepspeed_config() is not None


def is_zero3() -> bool:
    """Whether DeepSpeed keeps the student in pieces."""
    return bool(hf_deepspeed.is_deepspeed_zero3_enabled())


def mismatches(config: Mapping[str, Any], args: TrainingArguments) -> list[str]:
    """Where DeepSpeed's configuration and the training arguments contradict each other.

    transformers would say so when the training begins.
    """
    with aside():
        tried = hf_deepspeed.HfTrainerDeepSpeedConfig(dict(config))
        tried.trainer_config_process(args)
        hf_deepspeed.unset_hf_deepspeed_config()
    return [line.removeprefix("- ") for line in tried.mismatches]


@contextmanager
def aside() -> Iterator[None]:
    """Models that are loaded or made meanwhile are whole."""
    alive = _alive()
    if alive is None:
        yield
        return
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed.set_hf_deepspeed_config(alive)


@contextmanager
def instead(config: Mapping[str, Any]) -> Iterator[None]:
    """Models that are loaded meanwhile are for another engine.

    Args:
        config: Of that engine.
    """
    with aside():
        other = hf_deepspeed.HfDeepSpeedConfig(dict(config))
        try:
            yield
        finally:
            hf_deepspeed.unset_hf_deepspeed_config()
            del other


def _alive() -> Any:  # noqa: ANN401  transformers has no type for it
    """The configuration that transformers looks at; None without DeepSpeed."""
    return vars(hf_deepspeed)["_hf_deepspeed_config_weak_ref"]() if is_running() else None
