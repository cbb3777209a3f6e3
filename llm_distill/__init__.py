"""Distil Hugging Face language models: logits, hidden states and attention maps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_distill.data import Data
    from llm_distill.losses import (
        adaptive_kl,
        alpha_beta,
        cosine,
        decoupled,
        forward_kl,
        jsd,
        map_kl,
        map_mse,
        mse,
        reverse_kl,
        skew_forward_kl,
        skew_reverse_kl,
        todi,
        tvd,
    )
    from llm_distill.losses.sparse import coarsen
    from llm_distill.objectives import AttentionMaps, CrossEntropy, HiddenStates, Logits, Taid
    from llm_distill.students import FromConfig
    from llm_distill.teachers import Local
    from llm_distill.trainer import DistillTrainer

__version__ = "0.1.0"

_WHERE = {
    "AttentionMaps": "objectives",
    "CrossEntropy": "objectives",
    "Data": "data",
    "DistillTrainer": "trainer",
    "FromConfig": "students",
    "HiddenStates": "objectives",
    "Local": "teachers",
    "Logits": "objectives",
    "Taid": "objectives",
    "adaptive_kl": "losses",
    "alpha_beta": "losses",
    "coarsen": "losses.sparse",
    "cosine": "losses",
    "decoupled": "losses",
    "forward_kl": "losses",
    "jsd": "losses",
    "map_kl": "losses",
    "map_mse": "losses",
    "mse": "losses",
    "reverse_kl": "losses",
    "skew_forward_kl": "losses",
    "skew_reverse_kl": "losses",
    "todi": "losses",
    "tvd": "losses",
}

__all__ = [
    "AttentionMaps",
    "CrossEntropy",
    "Data",
    "DistillTrainer",
    "FromConfig",
    "HiddenStates",
    "Local",
    "Logits",
    "Taid",
    "adaptive_kl",
    "alpha_beta",
    "coarsen",
    "cosine",
    "decoupled",
    "forward_kl",
    "jsd",
    "map_kl",
    "map_mse",
    "mse",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "todi",
    "tvd",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  any public name
    """Import a public name when it is first used: `llm-distill --help` needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'llm_distill' has no attribute {name!r}")
    return getattr(import_module(f"llm_distill.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
