"""One global batch gives one result under every balance, however it is split; so does resuming.

Three steps of SGD on objectives of very different scales, some rows, micro-batches and ranks empty,
and a term that observes its own backward. Bound: 3e-7 of the largest number, in every weight.
"""

from typing import Any

import pytest
import torch

from tests.balance_worker import RULES, SHARDED
from tests.exactness_worker import EMPTY
from tests.launch import launch

BOUND = 3e-7
ENGINES = {"one": 1, "ddp": 2, "fsdp2": 2}
CASES = [(e, rule) for e in ENGINES for rule in (SHARDED if e == "fsdp2" else RULES)]
SPLITTINGS = [(e, r, b) for e, r in CASES for b in {"one": (1,), "ddp": (4, 1), "fsdp2": (4,)}[e]]
BALANCED = [rule for rule in RULES if rule != "none"]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each engine gave."""
    folder = tmp_path_factory.mktemp("balance")
    for engine, ranks in ENGINES.items():
        launch("tests.balance_worker", engine, str(folder), ranks=ranks)
    return {e: torch.load(folder / f"{e}.pt", weights_only=True) for e in ENGINES}


def deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The furthest weight, against numbers of 1 or, where they are larger, themselves."""
    assert a.keys() == b.keys()
    each = ((a[k] - b[k]).abs() / b[k].abs().clamp_min(1.0) for k in a)
    return max(float(x.max()) for x in each)


@pytest.mark.parametrize(("engine", "rule", "batch"), SPLITTINGS)
def test_splittings_agree(results: Any, engine: str, rule: str, batch: int) -> None:
    """Weights, balance and what the terms observed."""
    expected, found = results["one"][rule]["8"], results[engine][rule][str(batch)]
    worst = deviation(found["weights"], expected["weights"])
    assert worst <= BOUND, worst
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_move_are_logged(results: Any, rule: str) -> None:
    logs = results["one"][rule]["8"]["logs"]
    names = {"HiddenStates", "Thin"}  # a schedule and a gate
    names |= set() if rule == "none" else {"CrossEntropy", "Logits"}
    assert {k for k in logs[-1] if k.startswith("weight/")} == {f"weight/{n}" for n in names}
    for log in logs:
        weights = {"CrossEntropy": 0.5, "Logits": 1.0}
        weights |= {n: log[f"weight/{n}"] for n in names}
        expected = sum(weight * log.get(f"loss/{name}", 0.0) for name, weight in weights.items())
        assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_term_observes_the_whole_step(results: Any) -> None:
    """All supervised rows of the third step had a gradient."""
    from tests import tiny

    labels = tiny.rows(empty=EMPTY)["labels"][16:24]
    rows = sum(label != -100 for row in labels for label in row[1:])
    weights = results["ddp"]["none"]["1"]["weights"]
    (seen,) = (value for name, value in weights.items() if name.endswith("seen"))
    assert seen.tolist() == [rows, rows]


@pytest.mark.parametrize("rule", BALANCED)
def test_a_balance_moves_what_is_trained(results: Any, rule: str) -> None:
    one = results["one"]
    plain = {k: v for k, v in one["none"]["8"]["weights"].items() if k.startswith("student.")}
    moved = {k: v for k, v in one[rule]["8"]["weights"].items() if k in plain}
    assert deviation(moved, plain) > 1e-5
    assert any(name.startswith("balance.") for name in one[rule]["8"]["weights"])


@pytest.mark.parametrize(("engine", "rule"), CASES)
def test_resumed_equals_straight(results: Any, engine: str, rule: str) -> None:
    """Bit for bit, balance and observing term included, with dropout."""
    straight, resumed = results[engine][rule]["straight"], results[engine][rule]["resumed"]
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(("engine", "rule"), CASES)
def test_the_saved_student_has_nothing_of_it(results: Any, engine: str, rule: str) -> None:
    expected = ["config.json", "generation_config.json", "model.safetensors"]
    assert results[engine][rule]["files"] == expected
