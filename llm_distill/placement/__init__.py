"""Where a large frozen model lies: whole on every process, or in pieces on several."""

from llm_distill.placement.choice import (
    Facts,
    Placement,
    choose,
    compare,
)
from llm_distill.placement.device_maps import check_device_map, is_word, own_places
from llm_distill.placement.launch import caps, launched
from llm_distill.placement.machines import Launch
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
    "check_device_map",
    "check_spec",
    "choose",
    "compare",
    "dtype_of",
    "facts_of",
    "groups",
    "is_word",
    "launched",
    "load_partitioned",
    "load_sharded",
    "own_places",
    "resident_bytes",
    "skeleton",
]
