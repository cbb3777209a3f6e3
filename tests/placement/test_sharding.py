"""A teacher in pieces teaches what a whole one does, and lies in pieces.

Three steps of SGD with logits, hidden states, attention maps and relations, ranks without rows, on
2 and 4 gloo processes: every weight within 6e-7 of one process with a whole teacher.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_distill import Local
from llm_distill.errors import InputError
from llm_distill.placement import groups, resident_bytes
from llm_distill.signals import Request
from tests import tiny
from tests.launch import launch

BOUND = 6e-7

MODELS: dict[str, Any] = {
    "llama": lambda: tiny.llama("teacher"),
    "tied": lambda: tiny.llama("teacher", tied=True),
    "gpt2": tiny.gpt2,
    "bert": lambda: tiny.bert(depth=4),
}

TWO = {
    "ddp": [
        *("llama:auto", "llama:fsdp2", "llama:tp", "tied:fsdp2", "tied:tp", "gpt2:fsdp2"),
        *("bert:fsdp2", "llama:fsdp2:step", "llama:tp:step", "llama:fsdp2:data", "llama:tp:data"),
        *("llama:fsdp2:hidden", "llama:tp:hidden", "gpt2:fsdp2:hidden"),
        *("pair:fsdp2", "pair:tp:step", "routed:fsdp2", "routed:tp"),
    ],
    "fsdp2": ["llama:auto", "llama:fsdp2", "llama:tp", "gpt2:fsdp2", "llama:fsdp2:step"],
}
WHOLE = [*(f"{name}:replica" for name in MODELS), "llama:auto:step", "llama:replica:data"]
WHOLE += ["llama:replica:hidden", "gpt2:replica:hidden", "pair:replica", "routed:replica"]
FOUR = ["llama:hsdp:2", "llama:tp:2"]
CELLS = [
    *((engine, 2, cell) for engine, cells in TWO.items() for cell in cells),
    *((engine, 4, cell) for engine in TWO for cell in FOUR),
]
SHARDED = [cell for cell in CELLS if "auto" not in cell[2]]
GATHERED = [cell for cell in SHARDED if "tp" not in cell[2]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What every cell came to, by engine and processes."""
    folder = tmp_path_factory.mktemp("placement")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name, max_shard_size="60KB")
    worker = "tests.placement_worker", str(folder)
    launch(worker[0], "one", worker[1], *WHOLE)
    for engine, cells in TWO.items():
        launch(worker[0], engine, worker[1], *cells, ranks=2)
        launch(worker[0], engine, worker[1], *FOUR, ranks=4)
    return {
        (engine, ranks): torch.load(folder / f"{engine}{ranks}.pt", weights_only=True)
        for engine, ranks in [("one", 1), *((e, r) for e in TWO for r in (2, 4))]
    }


def reference(results: Any, cell: str) -> dict[str, torch.Tensor]:
    kind = "".join(f":{word}" for word in ("data", "hidden") if word in cell)
    found = results["one", 1][f"{cell.split(':')[0]}:replica{kind}"]
    weights: dict[str, torch.Tensor] = found["weights"]
    return weights


def deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks", "cell"), CELLS)
def test_pieces_teach_what_the_whole_does(results: Any, engine: str, ranks: int, cell: str) -> None:
    found = results[engine, ranks][cell]
    assert deviation(found["weights"], reference(results, cell)) <= BOUND
    assert found["world"] == ranks
    assert found["wrapped"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDPDistiller"}[engine]


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks", "cell"), SHARDED)
def test_each_process_holds_its_pieces_alone(
    results: Any, engine: str, ranks: int, cell: str
) -> None:
    """After three steps, norm and head included: 1 / N of the bytes, and 1 % (norms, under TP)."""
    found = results[engine, ranks][cell]
    pieces = 2 if "hsdp" in cell else ranks
    assert found["resident"] <= (1 / pieces + 0.01) * found["whole"]
    assert f"on each of {'2 x 2' if cell == 'llama:tp:2' else pieces} processes" in found["told"][0]


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks", "cell"), GATHERED)
def test_blocks_are_gathered_one_at_a_time(
    results: Any, engine: str, ranks: int, cell: str
) -> None:
    """While a block runs, it is whole, and at most embedding, head and positions beside it; then
    nothing is. A tied matrix is gathered for either of its names.
    """
    found = results[engine, ranks][cell]
    assert len(found["groups"]) > 3
    assert found["gathered"] == []
    beside = {"llama": 0, "pair": 0, "routed": 0, "tied": 2.1, "gpt2": 1.6, "bert": 2}[
        cell.split(":")[0]
    ]
    assert 0 < found["block"] <= found["live"] <= found["block"] + beside * found["head"]
    assert found["live"] < 0.5 * found["whole"]


@pytest.mark.distributed
def test_a_teacher_may_run_once_a_step(results: Any) -> None:
    """Three steps of several micro-batches: three forwards, and the same weights."""
    for key, cell in ((("one", 1), "llama:auto:step"), (("ddp", 2), "llama:tp:step")):
        found = results[key][cell]
        assert found["forwards"] == 3
        assert deviation(found["weights"], reference(results, cell)) <= BOUND


@pytest.mark.distributed
@pytest.mark.parametrize("cell", ["llama:fsdp2:data", "llama:tp:data"])
def test_calibration_and_evaluation_read_all_pieces(results: Any, cell: str) -> None:
    """What data decide is the same, and every row of an evaluation counts once."""
    expected = results["one", 1]["llama:replica:data"]["eval"]
    assert results["ddp", 2][cell]["eval"] == pytest.approx(expected, rel=1e-5)


def test_whole_models_have_no_groups() -> None:
    model = tiny.llama("teacher")
    assert groups(model) == []
    assert resident_bytes(model) == 4 * model.num_parameters()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "fsdp"}, "shard is 'fsdp'; write one of auto, replica, fsdp2, hsdp, tp"),
        ({"shard": "tp", "device_map": "auto"}, "both say where the weights go"),
    ],
)
def test_settings_that_contradict_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Local("an/id", **settings)


def test_a_loaded_model_is_where_it_is() -> None:
    with pytest.raises(InputError, match="this one is loaded; give its id or path"):
        Local(tiny.llama("teacher"), shard="fsdp2")


def test_a_launch_of_one_process_is_refused_before_weights_load(tmp_path: Path) -> None:
    tiny.llama("teacher").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="spreads it over processes and there is one"):
        Local(str(tmp_path), shard="fsdp2").check(Request(logits=True), torch.device("cpu"))
