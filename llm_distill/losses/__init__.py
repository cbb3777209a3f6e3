"""Losses: rows in, one value per row out.

The contract, for every function of this package: two aligned tensors `(student, teacher)`, then
keyword-only hyper-parameters; one value per row is returned. (`decoupled` takes the labels as a
third tensor.) No mask, no row weight, no reduction, no temperature: rows are chosen before
(`llm_distill.rows`), values are summed after (`llm_distill.objectives`). So a new loss is two
lines.

Shape letters: B sequences, T positions, N rows, V vocabulary, K kept tokens, D features, H heads.
Values are in nats for divergences.
"""

from llm_distill.losses.attention import map_kl, map_mse
from llm_distill.losses.contrastive import info_nce
from llm_distill.losses.divergences import (
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from llm_distill.losses.energy import attention_transfer
from llm_distill.losses.features import cosine, huber, mse
from llm_distill.losses.neurons import nst
from llm_distill.losses.relations import cka, pkt, rkd_angle, rkd_distance
from llm_distill.losses.reweighted import adaptive_kl, alpha_beta, decoupled, todi

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "attention_transfer",
    "cka",
    "cosine",
    "decoupled",
    "forward_kl",
    "huber",
    "info_nce",
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
