"""Distil Hugging Face language models: logits, hidden states and attention maps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_distill.data import Data
    from llm_distill.layers import LayerMap
    from llm_distill.losses import (
        adaptive_kl,
        alpha_beta,
        attention_transfer,
        cka,
        cosine,
        decoupled,
        forward_kl,
        huber,
        jsd,
        map_kl,
        map_mse,
        mse,
        nst,
        pkt,
        reverse_kl,
        rkd_angle,
        rkd_distance,
        skew_forward_kl,
        skew_reverse_kl,
        todi,
        tvd,
    )
    from llm_distill.losses.sparse import coarsen
    from llm_distill.objectives import (
        AttentionMaps,
        Contrastive,
        CrossEntropy,
        HiddenStates,
        Logits,
        Relations,
        Taid,
    )
    from llm_distill.students import FromConfig, FromTeacher
    from llm_distill.teachers import (
        AdapterOff,
        BornAgain,
        Cached,
        DeepToShallow,
        Ema,
        Ensemble,
        Local,
        Remote,
        Routed,
    )
    from llm_distill.trainer import DistillTrainer

__version__ = "0.1.0"

_WHERE = {
    "AdapterOff": "teachers",
    "AttentionMaps": "objectives",
    "BornAgain": "teachers",
    "Cached": "teachers",
    "Contrastive": "objectives",
    "CrossEntropy": "objectives",
    "Data": "data",
    "DeepToShallow": "teachers",
    "DistillTrainer": "trainer",
    "Ema": "teachers",
    "Ensemble": "teachers",
    "FromConfig": "students",
    "FromTeacher": "students",
    "HiddenStates": "objectives",
    "LayerMap": "layers",
    "Local": "teachers",
    "Logits": "objectives",
    "Relations": "objectives",
    "Remote": "teachers",
    "Routed": "teachers",
    "Taid": "objectives",
    "adaptive_kl": "losses",
    "alpha_beta": "losses",
    "attention_transfer": "losses",
    "cka": "losses",
    "coarsen": "losses.sparse",
    "cosine": "losses",
    "decoupled": "losses",
    "forward_kl": "losses",
    "huber": "losses",
    "jsd": "losses",
    "map_kl": "losses",
    "map_mse": "losses",
    "mse": "losses",
    "nst": "losses",
    "pkt": "losses",
    "reverse_kl": "losses",
    "rkd_angle": "losses",
    "rkd_distance": "losses",
    "skew_forward_kl": "losses",
    "skew_reverse_kl": "losses",
    "todi": "losses",
    "tvd": "losses",
}

__all__ = [
    "AdapterOff",
    "AttentionMaps",
    "BornAgain",
    "Cached",
    "Contrastive",
    "CrossEntropy",
    "Data",
    "DeepToShallow",
    "DistillTrainer",
    "Ema",
    "Ensemble",
    "FromConfig",
    "FromTeacher",
    "HiddenStates",
    "LayerMap",
    "Local",
    "Logits",
    "Relations",
    "Remote",
    "Routed",
    "Taid",
    "adaptive_kl",
    "alpha_beta",
    "attention_transfer",
    "cka",
    "coarsen",
    "cosine",
    "decoupled",
    "forward_kl",
    "huber",
    "jsd",
    "map_kl",
    "map_mse",
    "mse",
    "nst",
    "pkt",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
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
