"""Tensor parallelism on one process is no change; on several, `test_sharding` shows it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm_distill.attention import Heads
from llm_distill.placement import Spread
from tests.placement.test_joining import batches


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Spread]:
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Spread(dist.group.WORLD)  # type: ignore[arg-type]  # there is one now
    dist.destroy_process_group()


@pytest.mark.parametrize("side", ["right", "left"])
def test_alone_nothing_changes(alone: Spread, side: str) -> None:
    for batch in batches(side):
        wide = alone.widened(batch)
        assert wide.inputs.keys() >= batch.inputs.keys()
        assert all(torch.equal(wide.inputs[name], batch.inputs[name]) for name in batch.inputs)
        assert wide.queries is not None
        assert batch.queries is not None
        assert torch.equal(wide.queries.position, batch.queries.position)
        states = torch.randn(*batch.inputs["input_ids"].shape, 4)
        assert torch.equal(alone.own(states, batch), states)


def test_heads_of_own_sequences(alone: Spread) -> None:
    batch = batches()[1]
    sequences, length = batch.inputs["input_ids"].shape
    assert batch.queries is not None
    places = batch.queries.position.shape[1]
    for mask in (None, torch.ones(1, 1, places, length), torch.ones(sequences, 4, places, length)):
        heads = Heads(
            torch.randn(sequences, 4, places, 8), torch.randn(sequences, 2, length, 8), mask, 1.0
        )
        own = alone.own_heads(heads, batch)
        assert torch.equal(own.query, heads.query)
        assert torch.equal(own.key, heads.key)
        assert own.value is None
        assert (own.mask is None) == (mask is None)
        assert own.mask is None or torch.equal(own.mask, heads.mask)  # type: ignore[arg-type]
