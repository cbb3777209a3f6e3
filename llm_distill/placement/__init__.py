"""Where a large frozen model lies: whole on every process, or in pieces on several."""

from llm_distill.placement.choice import SHARDS, Facts, Launch, Placement, Shard, choose
from llm_distill.placement.launch import caps, launched
from llm_distill.placement.partitioning import load_partitioned
from llm_distill.placement.sharding import (
    groups,
    load_sharded,
    resident_bytes,
)
from llm_distill.placement.sizes import facts_of
from llm_distill.placement.spreading import Spread

__all__ = [
    "SHARDS",
    "Facts",
    "Launch",
    "Placement",
    "Shard",
    "Spread",
    "caps",
    "choose",
    "facts_of",
    "groups",
    "launched",
    "load_partitioned",
    "load_sharded",
    "resident_bytes",
]
