"""Several teachers: one result however the batch is split over micro-batches, ranks and shards."""

from typing import Any

import pytest
import torch

from tests import tiny
from tests.launch import launch
from tests.several_worker import DOMAINS, KINDS, rows
from tests.test_exactness import BOUND, deviation

ENGINES = ("one", "ddp", "fsdp2")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each engine came to."""
    folder = tmp_path_factory.mktemp("several")
    for engine in ENGINES:
        launch("tests.several_worker", engine, str(folder), ranks=1 if engine == "one" else 2)
    return {engine: torch.load(folder / f"{engine}.pt", weights_only=True) for engine in ENGINES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_splittings_agree(results: dict[str, Any], engine: str, kind: str) -> None:
    reference = results["one"][f"{kind} 8"]
    for batch in (8, 1 if engine == "one" else 2):
        found = results[engine][f"{kind} {batch}"]
        assert deviation(reference["weights"], found["weights"]) <= BOUND
        assert found["kl"] == pytest.approx(reference["kl"], rel=1e-5)


def test_it_was_trained_and_distributed(results: dict[str, Any]) -> None:
    start = tiny.llama("student").state_dict()
    for kind in KINDS:
        end = results["one"][f"{kind} 8"]["weights"]
        assert min(float((end[f"student.{k}"] - v).abs().max()) for k, v in start.items()) > 1e-6
    assert results["ddp"]["wrapped"] == "DistributedDataParallel"
    assert results["fsdp2"]["wrapped"] == "FSDPDistiller"


def test_a_rank_had_no_example_of_an_expert() -> None:
    """Rows 0 to 3 are rank 0's first micro-batch."""
    named = [row["domain"] for row in rows()]
    assert set(named[:4]) == {DOMAINS[0]}
    assert set(named) == set(DOMAINS)
