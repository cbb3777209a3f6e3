"""Writing a cache: the teacher runs once over all examples, shard by shard, on any number of ranks.

Which examples a shard holds follows from the data alone. A shard is renamed when it is whole, with
a note beside it of what it holds; a run that was killed goes on with the first shard that is
missing. The manifest comes last: a cache without one is not read. One launch at a time writes into
a folder, and nothing is deleted there but what a manifest or a lock says to be of a cache.
"""

from llm_distill.caching.folder import check_beside, check_folder, check_place
from llm_distill.caching.plan import Capture
from llm_distill.caching.writing import write_cache

__all__ = ["Capture", "check_beside", "check_folder", "check_place", "write_cache"]
