"""A teacher in pieces teaches what a whole one does, and lies in pieces.

Three steps of SGD with logits, hidden states, attention maps and relations, ranks without rows, on
2 and 4 gloo processes: every weight within 6e-7 of one process with a whole teacher.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm_distill import Local
from llm_distill.errors import InputError
from llm_distill.placement import Facts, groups, resident_bytes
from llm_distill.placement.sharding import _check_groups
from llm_distill.signals import Request
from tests import own_model, tiny
from tests.launch import launch
from tests.placement_worker import MEMORY

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
        *("llama:fsdp2:micro", "own:fsdp2", "llama:disk", "llama:anywhere"),
    ],
    "fsdp2": [
        *("llama:auto", "llama:fsdp2", "llama:tp", "gpt2:fsdp2", "llama:fsdp2:step"),
        *("llama:disk", "llama:anywhere"),
    ],
}
WHOLE = [*(f"{name}:replica" for name in MODELS), "llama:auto:step", "llama:replica:data"]
WHOLE += ["llama:replica:hidden", "gpt2:replica:hidden", "pair:replica", "routed:replica"]
WHOLE += ["own:replica"]
FOUR = ["llama:hsdp:2", "llama:tp:2"]
CELLS = [
    *((engine, 2, cell) for engine, cells in TWO.items() for cell in cells),
    *((engine, 4, cell) for engine in TWO for cell in FOUR),
]
SHARDED = [cell for cell in CELLS if {"fsdp2", "tp", "hsdp"} & {*cell[2].split(":")}]
GATHERED = [cell for cell in SHARDED if "tp" not in cell[2]]
MAPPED = [cell for cell in CELLS if cell[2] in ("llama:disk", "llama:anywhere")]

GROUPS = {
    "llama": ["<root>", "model.embed_tokens", "model.layers.*", "model.norm", "lm_head"],
    "tied": ["<root>", "model.embed_tokens", "model.layers.*", "model.norm"],
    "gpt2": ["<root>", "transformer.wte", "transformer.h.*"],
    "bert": ["<root>", "bert.embeddings.word_embeddings", "bert.encoder.layer.*"],
    "own": ["<root>", "inner.words", "inner.stack.*", "head"],
}
"""What is gathered together, `*` for each block. Of a Llama, transformers gathers the last norm and
the head, or the tied embedding, as one."""

WAITS = {"tied": ["model.embed_tokens.weight", "model.norm.weight"]}
"""Groups that opened before the blocks, and close behind them."""

NAMED = {
    "llama": [],
    "own": [],
    "tied": ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"],
    "gpt2": [
        "lm_head.weight",
        *(f"transformer.{n}" for n in ("ln_f.bias", "ln_f.weight", "wpe.weight")),
    ],
}
"""The weights that are whole beside a block, written out; BERT has eleven."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What every cell came to, by engine and processes."""
    folder = tmp_path_factory.mktemp("placement")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name, max_shard_size="60KB")
    own_model.save(folder / "own")
    worker = "tests.placement_worker", str(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
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
class TestPieces:
    def test_each_process_holds_its_own_alone(
        self, results: Any, engine: str, ranks: int, cell: str
    ) -> None:
        """After three steps, norm and head included: 1 / N of the bytes, 1 % for norms under TP."""
        found, pieces = results[engine, ranks][cell], shares(ranks, cell)
        assert len(found["resident"]) == ranks
        for here in found["resident"]:
            assert here <= (1 / pieces + 0.01) * found["whole"]
        assert sum(found["resident"]) >= found["whole"] * ranks / pieces
        split = "2 x 2" if cell == "llama:tp:2" else pieces
        assert f"on each of {split} processes" in found["told"][0]

    def test_each_process_reads_its_own_alone(
        self, results: Any, engine: str, ranks: int, cell: str
    ) -> None:
        """Bytes that are asked of the files while the teachers load."""
        found, pieces = results[engine, ranks][cell], shares(ranks, cell)
        assert len(found["read"]) == ranks
        for read in found["read"]:
            assert read <= (1 / pieces + 0.01) * found["load"]
        assert sum(found["read"]) >= found["load"] * ranks / pieces

    def test_a_tied_matrix_counts_once(
        self, results: Any, engine: str, ranks: int, cell: str
    ) -> None:
        kind = cell.split(":")[0]
        if kind in MODELS and cell != "llama:fsdp2:hidden" and cell != "llama:tp:hidden":
            assert results[engine, ranks][cell]["whole"] == 4 * MODELS[kind]().num_parameters()


def shares(ranks: int, cell: str) -> int:
    """Processes that hold a copy together."""
    return 2 if "hsdp" in cell else ranks


@pytest.mark.distributed
@pytest.mark.parametrize("engine", TWO)
def test_a_whole_teacher_is_read_whole(results: Any, engine: str) -> None:
    """The count would mean nothing if it missed some."""
    found = results[engine, 2]["llama:auto"]
    assert found["read"] == found["resident"] == [found["whole"]] * 2


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks", "cell"), GATHERED)
class TestGroups:
    def test_they_are_these(self, results: Any, engine: str, ranks: int, cell: str) -> None:
        kind = KINDS.get(cell.split(":")[0], cell.split(":")[0])
        depth = {"llama": 3 if "hidden" in cell else 4, "gpt2": 3, "own": 3}.get(kind, 4)
        expected = [
            name.replace("*", str(block))
            for name in GROUPS[kind]
            for block in range(depth if "*" in name else 1)
        ]
        assert results[engine, ranks][cell]["groups"] == expected

    def test_one_block_is_whole_at_a_time(
        self, results: Any, engine: str, ranks: int, cell: str
    ) -> None:
        """Beside it nothing, of a model in which all else that is large has a group of its own.

        What has none is in the root's, which is open throughout the forward: small norms,
        positions, and the second name of a tied matrix, whose first is the embedding's. Of a tied
        Llama, that embedding shares the last norm's group, and waits for it: the matrix is there
        twice. The matrix of the head pass, which no module gathers, comes later and has gone before
        the next block runs.
        """
        found = results[engine, ranks][cell]
        kind = KINDS.get(cell.split(":")[0], cell.split(":")[0])
        groups, sizes = found["groups"][1:], found["sizes"]
        root = [n for n in sizes if not any(n.startswith(f"{group}.") for group in groups)]
        assert found["beside"] == sorted(root + WAITS.get(kind, []))
        assert found["beside"] == NAMED.get(kind, found["beside"])
        assert found["live"] == found["block"] + sum(sizes[name] for name in found["beside"])
        assert found["block"] > 0
        assert found["kept"] == 0
        assert found["heads"] == (0 if "hidden" in cell else found["forwards"])

    def test_nothing_stays(self, results: Any, engine: str, ranks: int, cell: str) -> None:
        assert results[engine, ranks][cell]["gathered"] == []


KINDS = {"pair": "llama", "routed": "llama"}
"""Of several, the first is watched."""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "ranks", "cell"),
    [
        ("one", 1, "llama:auto:step"),
        ("ddp", 2, "llama:tp:step"),
        ("ddp", 2, "llama:fsdp2:step"),
        ("fsdp2", 2, "llama:fsdp2:step"),
    ],
)
def test_a_teacher_may_run_once_a_step(results: Any, engine: str, ranks: int, cell: str) -> None:
    """Three steps of several micro-batches: three forwards, and the same weights."""
    found = results[engine, ranks][cell]
    assert found["forwards"] == 3
    assert deviation(found["weights"], reference(results, cell)) <= BOUND


@pytest.mark.distributed
def test_pieces_are_gathered_once_a_step(results: Any) -> None:
    """Four blocks and a head in each of three steps; else for each of four micro-batches."""
    for engine in TWO:
        found = results[engine, 2]["llama:fsdp2:step"]
        assert (found["gathers"], found["heads"]) == (3 * 4, 3)
    alone = results["ddp", 2]["llama:fsdp2:micro"]
    assert (alone["forwards"], alone["gathers"], alone["heads"]) == (3 * 4, 3 * 4 * 4, 3 * 4)


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks", "cell"), MAPPED)
def test_each_process_has_its_own_copy_in_memory_and_on_disk(
    results: Any, engine: str, ranks: int, cell: str
) -> None:
    found = results[engine, ranks][cell]
    assert found["places"] == ["cpu", "disk"]
    if cell == "llama:anywhere":
        assert found["live"] <= MEMORY / ranks / 2 < found["whole"]
        assert found["told"][0].endswith(
            "offload (device_map: auto, for each of 2 processes on its own)"
        )


@pytest.mark.distributed
@pytest.mark.parametrize("cell", ["llama:fsdp2:data", "llama:tp:data"])
def test_calibration_and_evaluation_read_all_pieces(results: Any, cell: str) -> None:
    """What data decide is the same, and every row of an evaluation counts once."""
    expected = results["one", 1]["llama:replica:data"]["eval"]
    assert results["ddp", 2][cell]["eval"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_would_be_gathered_whole_is_refused(tmp_path: Path) -> None:
    """As GPT-2 was by the plan of its class: a root and nothing else."""
    model = tiny.llama("teacher")
    facts = Facts("m", 0, blocks="model.layers")
    with pytest.raises(RuntimeError, match=r"m \(LlamaForCausalLM\) lies in 0 groups and has 4 bl"):
        _check_groups(model, facts)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        wanted = "lies in 1 groups and has 4 blocks: <root>; please report it, and write shard: rep"
        with pytest.raises(RuntimeError, match=wanted):
            _check_groups(model, facts)
        model = tiny.llama("teacher")
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert groups(model) == ["<root>", *(f"model.layers.{block}" for block in range(4))]
        _check_groups(model, facts)
    finally:
        dist.destroy_process_group()


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
