"""One global batch gives one result, however it is split over micro-batches, ranks and shards.

Three steps of SGD at 1e-2 in fp32 with all three signals and relations, random and fitted
projectors, matched heads, very uneven token counts, and rows, whole micro-batches and ranks without
any supervised token. Bound: 3e-7 in every weight.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tests.exactness_worker import EMPTY
from tests.launch import launch

BOUND = 3e-7
NAMES = (
    "CrossEntropy",
    "Logits",
    "HiddenStates",
    "HiddenStates.2",
    "AttentionMaps",
    "Relations",
    "moving",
)
BESIDE = {"loss", "target/moving", "kl", "agreement", "entropy"}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Final weights of each engine and splitting."""
    folder = tmp_path_factory.mktemp("exactness")
    for engine, ranks in (("one", 1), ("ddp", 2), ("fsdp2", 2)):
        launch("tests.exactness_worker", engine, str(folder), ranks=ranks)
    return {e: torch.load(folder / f"{e}.pt", weights_only=True) for e in ("one", "ddp", "fsdp2")}


def deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("label", ["full", "empty", "stream"])
@pytest.mark.parametrize(
    ("engine", "splitting"),
    [("one", "1x1x8"), ("ddp", "2x4x1"), ("ddp", "2x1x4"), ("fsdp2", "2x4x1"), ("fsdp2", "2x1x4")],
)
def test_splittings_agree(results: dict[str, Any], engine: str, splitting: str, label: str) -> None:
    """Ranks x micro-batch x accumulation against 1 x 8 x 1; a stream against the same rows."""
    reference = results["one"][f"{label} 1x8x1".replace("stream", "full")]
    worst = deviation(reference, results[engine][f"{label} {splitting}"])
    assert worst <= BOUND, worst


@pytest.mark.parametrize(("engine", "batch"), [("one", 1), ("ddp", 4), ("ddp", 1), ("fsdp2", 4)])
@pytest.mark.parametrize("label", ["full", "empty"])
def test_logs_are_those_of_one_process(
    results: dict[str, Any], label: str, engine: str, batch: int
) -> None:
    """The loss, each objective without its weight, and the measures, over all batches and ranks."""
    reference = results["one"][f"logs {label} 8"]
    assert len(reference) == 3
    for ours, expected in zip(results[engine][f"logs {label} {batch}"], reference, strict=True):
        assert set(expected) == BESIDE | {f"loss/{name}" for name in NAMES}
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_evaluation_counts_every_row_once(results: dict[str, Any], engine: str) -> None:
    """9 rows on 2 ranks: Accelerate repeats some to even out the ranks, and they do not count."""
    for key, expected in results["one"]["eval full 8"].items():
        for batch in (4, 1):
            assert results[engine][f"eval full {batch}"][key] == pytest.approx(expected, rel=1e-5)


def test_training_moved_the_weights(results: dict[str, Any]) -> None:
    """The bound would mean nothing for weights that stay."""
    from tests import tiny

    start = tiny.llama("student").state_dict()
    end = results["one"]["full 1x8x1"]
    moved = [float((end[f"student.{k}"] - v).abs().max()) for k, v in start.items()]
    assert min(moved) > 1e-5
    assert any(name.startswith("terms.") for name in end)
    assert deviation(end, results["one"]["empty 1x8x1"]) > 1e-4


@pytest.mark.parametrize("label", ["full", "empty"])
def test_a_moving_target_hears_of_the_whole_step(results: dict[str, Any], label: str) -> None:
    """The share of the next step follows from the means that were logged, as plain floats say."""
    logs = results["one"][f"logs {label} 8"]
    shares = reference.taid([log["loss/moving"] for log in logs], 0.2, 1.0, 0.3, 0.5)
    # A log tells the share after its step.
    assert [log["target/moving"] for log in logs] == pytest.approx(shares, rel=1e-6)
    assert shares[1] > 0.2 + 0.8 * 2 / 3 - 1e-6


def test_two_processes_really_ran(results: dict[str, Any]) -> None:
    """The engine that was asked for: `accelerate launch --cpu` would have run one process."""
    assert [results[e]["world"] for e in ("one", "ddp", "fsdp2")] == [1, 2, 2]
    assert results["ddp"]["wrapped"] == "DistributedDataParallel"
    assert results["fsdp2"]["wrapped"] == "FSDPDistiller"


def test_fsdp2_shards_block_by_block(results: dict[str, Any]) -> None:
    """All parameters are sharded; the head is in the root group, where its pass reads it."""
    facts = results["fsdp2"]
    layers = ["student.model.layers.0", "student.model.layers.1"]
    assert facts["groups"] == ["<root>", *layers]
    assert facts["dtensors"] == facts["parameters"]


def test_some_ranks_were_empty() -> None:
    """Rows 0 to 3 are rank 0's first micro-batch, and have nothing to predict."""
    from tests import tiny

    rows = tiny.rows(empty=EMPTY)
    assert all(label == -100 for row in (0, 1, 2, 3) for label in rows[row]["labels"])
    supervised = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
    assert len(set(supervised)) > 8


def test_bf16_under_fsdp2_keeps_shares_and_loss_in_fp32(tmp_path: Path) -> None:
    launch("tests.fsdp2_dtypes_worker", str(tmp_path), ranks=2)
    facts = torch.load(tmp_path / "dtypes.pt", weights_only=True)
    assert facts["share"] == facts["loss"] == "torch.float32"
    assert facts["compute"] == "torch.bfloat16"
    assert facts["teacher"] == "torch.float32"
    assert facts["losses"] == pytest.approx(facts["plain"], rel=2e-2)
