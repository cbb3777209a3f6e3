"""Which layer of the student learns from which layer of the teacher.

Layers are numbered as `hidden_states` of transformers: 0 is the embedding, k = 1..depth is the
output of block k (the last one after the final norm), so that one map serves hidden states and the
heads of block k alike. Negative numbers count from the end, -1 is the last block. A strategy is a
function of the two depths; what data must decide (`similarity`, `cross`, `blocks`, `epoch`, `race`)
are keywords of these names.
"""

from llm_distill.layers.crossed import cka, transport
from llm_distill.layers.decided import RaceSettings as RaceSettings
from llm_distill.layers.decided import auto_race, learned, provenance
from llm_distill.layers.decided import race_settings as race_settings
from llm_distill.layers.evidence import LayerEvidence as LayerEvidence
from llm_distill.layers.evidence import asks as asks
from llm_distill.layers.evidence import decide as decide
from llm_distill.layers.map import LayerMap
from llm_distill.layers.map import LayerStrategy as LayerStrategy
from llm_distill.layers.map import Row as Row
from llm_distill.layers.refresh import looks as looks
from llm_distill.layers.refresh import refreshed as refreshed
from llm_distill.layers.refresh import stays as stays
from llm_distill.layers.segments import arc_length, auto, coverage, segmentation
from llm_distill.layers.segments import covered as covered
from llm_distill.layers.segments import score as score
from llm_distill.layers.similarity import Similarities as Similarities
from llm_distill.layers.similarity import Similarity as Similarity
from llm_distill.layers.similarity import keep as keep
from llm_distill.layers.similarity import normed as normed
from llm_distill.layers.strategies import (
    explicit,
    first,
    last,
    random,
    reverse,
    saved,
    skip,
    uniform,
)

# The functions in here are what a recipe may write under `layers`: the strategies, and no other.
__all__ = [
    "LayerMap",
    "arc_length",
    "auto",
    "auto_race",
    "cka",
    "coverage",
    "explicit",
    "first",
    "last",
    "learned",
    "provenance",
    "random",
    "reverse",
    "saved",
    "segmentation",
    "skip",
    "transport",
    "uniform",
]
