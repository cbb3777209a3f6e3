"""A teacher under an engine of its own says, to the bit, what a whole one does."""

from typing import Any

import pytest
import torch

from tests import tiny
from tests.zero3.engine import launch, needs_deepspeed
from tests.zero3_signals_worker import DTYPES

pytestmark = [
    needs_deepspeed,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

MODELS: dict[str, Any] = {
    "llama": lambda: tiny.llama("teacher"),
    "tied": lambda: tiny.llama("teacher", tied=True),
    "qwen3": tiny.qwen3,
    "gemma3": lambda: tiny.gemma3(softcap=5.0),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """The largest difference in each signal, on each of two processes."""
    folder = tmp_path_factory.mktemp("signals")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    launch("-m", "tests.zero3_signals_worker", str(folder), *MODELS)
    found: list[dict[str, dict[str, float]]] = torch.load(folder / "signals.pt", weights_only=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_signal_is_the_same(results: Any, kind: str, dtype: str) -> None:
    for rank in results:
        worst = rank[f"{kind} {dtype}"]
        assert {"logits", "state 3", "query 2", "value 1"} <= worst.keys()
        assert set(worst.values()) == {0.0}


def test_every_process_was_asked(results: Any) -> None:
    assert len(results) == 2
