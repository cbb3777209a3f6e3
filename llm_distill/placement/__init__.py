"""Where a large frozen model lies: whole on every process, or in pieces on several."""

from llm_distill.placement.choice import (
    Facts,
    Launch,
    Placement,
    choose,
    compare,
)
from llm_distill.placement.launch import caps, launched
from llm_distill.placement.partitioning import load_partitioned
from llm_distill.placement.sharding import (
    groups,
    load_sharded,
    resident_bytes,
)
from llm_distill.placement.sizes import dtype_of, facts_of, skeleton
from llm_distill.placement.spec import Shard, check_spec
from llm_distill.placement.spreading import Spread

__all__ = [
    "Facts",
    "Launch",
    "Placement",
    "Shard",
    "Spread",
    "caps",
    "check_spec",
    "choose",
    "compare",
    "dtype_of",
    "facts_of",
    "groups",
    "launched",
    "load_partitioned",
    "load_sharded",
    "resident_bytes",
    "skeleton",
]
