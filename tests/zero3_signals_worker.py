"""Asks a teacher that is whole and one under an engine of its own about the same batch.

Usage: python -m tests.zero3_signals_worker FOLDER MODEL...   (under torchrun)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests import tiny
from tests.launch import finish
from tests.zero3_worker import configuration

DTYPES = ("float32", "bfloat16")


def signals(said: Any) -> dict[str, Tensor]:
    """Everything that a teacher said, under one name each."""
    found = {"logits": said.whole.logits(slice(None))}
    found |= {f"state {layer}": state for layer, state in said.states.items()}
    for layer, heads in said.attention.items():
        found |= {f"query {layer}": heads.query, f"key {layer}": heads.key}
        found |= {f"value {layer}": heads.value} if heads.value is not None else {}
    return found


def main(folder: Path, kinds: list[str]) -> None:
    """Three batches of each model in each dtype."""
    from llm_distill import Local
    from llm_distill.binding import make_batch
    from llm_distill.collation import RowCollator
    from llm_distill.data import Collator
    from llm_distill.objectives import QueryPlan
    from llm_distill.signals import Request

    torch.set_num_threads(1)
    args = tiny.arguments(folder / "out", deepspeed=configuration("zero3", bare=False))
    collate, layers = RowCollator(Collator(pad_token_id=0), shift=True, valid=True), (0, 1, 2, 3)
    some = frozenset({1, 2})
    request = Request(logits=True, hidden=frozenset(layers), heads=some, relations=some)
    facts: dict[str, dict[str, float]] = {}
    for kind in kinds:
        for dtype in DTYPES:
            shards: list[Any] = ["replica", "zero3"]
            teachers = [Local(str(folder / kind), shard=s, dtype=dtype) for s in shards]
            sources = [teacher.open(request, args.device) for teacher in teachers]
            worst: dict[str, float] = {}
            for number in range(3):  # the engine knows its order from the second one on
                start = 3 * (2 * number + dist.get_rank())
                rows = [tiny.rows()[start + k] for k in range(3)]
                plan = QueryPlan(4, "valid")
                batch = make_batch(collate(rows), plan, seed=0, epoch=0)
                whole, pieces = (signals(source(batch)) for source in sources)
                assert whole.keys() == pieces.keys()
                for name, value in whole.items():
                    away = float((value.float() - pieces[name].float()).abs().max())
                    worst[name] = max(away, worst.get(name, 0.0))
            facts[f"{kind} {dtype}"] = worst
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    if dist.get_rank() == 0:
        torch.save(gathered, folder / "signals.pt")
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
