"""Where a large frozen model lies: whole on every process, or in pieces on several."""

from llm_distill.placement.choice import SHARDS, Facts, Launch, Placement, Shard, choose, compare
from llm_distill.placement.launch import launched
from llm_distill.placement.sharding import (
    groups,
    load_sharded,
    resident_bytes,
)
from llm_distill.placement.sizes import dtype_of, facts_of, skeleton
from llm_distill.placement.spreading import Spread

__all__ = [
    "SHARDS",
    "Facts",
    "Launch",
    "Placement",
    "Shard",
    "Spread",
    "choose",
    "compare",
    "dtype_of",
    "facts_of",
    "groups",
    "launched",
    "load_sharded",
    "resident_bytes",
    "skeleton",
]
