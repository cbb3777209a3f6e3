"""Writes a cache; is killed after some shards where it is told so."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from llm_distill.caching import write_cache, writing
from llm_distill.caching.asking import write_shard
from tests import caches, launch

KILL_AFTER = int(sys.argv[2]) if len(sys.argv) > 2 else None

done: list[int] = []


def watched(*args: Any) -> Any:
    """The same, until it is time."""
    if len(done) == KILL_AFTER:
        args = (*args[:3], lambda rows: os.kill(os.getpid(), signal.SIGKILL))
    shard = write_shard(*args)
    done.append(args[1].number)
    return shard


vars(writing)["write_shard"] = watched
write_cache(caches.capture(Path(sys.argv[1])))
sys.stdout.write(f"wrote shards {done}\n")
launch.finish()
