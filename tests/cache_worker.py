"""Writes a cache; is killed after some shards where it is told so."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from llm_distill import HiddenStates
from llm_distill.caching import write_cache, writing
from llm_distill.caching.asking import write_shard
from tests import caches, launch


def main(folder: str, kill_after: int, what: str) -> None:
    """Write it, shard by shard.

    Args:
        folder: Of the models and the cache.
        kill_after: Shards, before this process kills itself; -1: never.
        what: `hints`: hidden states as well, on a map that is decided here.
    """
    done: list[int] = []

    def watched(*args: Any) -> Any:
        if len(done) == kill_after:
            args = (*args[:3], lambda rows: os.kill(os.getpid(), signal.SIGKILL))
        shard = write_shard(*args)
        done.append(args[1].number)
        return shard

    vars(writing)["write_shard"] = watched
    hints = [HiddenStates(rows="valid")] if what == "hints" else []
    write_cache(caches.capture(Path(folder), hints=hints))
    sys.stdout.write(f"wrote shards {done}\n")
    launch.finish()


if __name__ == "__main__":
    main(sys.argv[1], int((sys.argv[2:] or ["-1"])[0]), (sys.argv[3:] or [""])[0])
