"""A vocabulary in slices gives the KL of the whole one, value and both gradients."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.launch import launch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file: Path = tmp_path_factory.mktemp("vocabulary") / "found.pt"
    launch("tests.vocabulary_worker", str(file), ranks=2)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("what", ["values", "hidden", "head"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 2e-5)])
def test_slices_against_the_whole(found: Any, dtype: str, bound: float, what: str) -> None:
    assert found[dtype][what] <= bound


def test_forbidden_tokens(found: Any) -> None:
    """0 and finite at identity; infinite where the student forbids what the teacher says."""
    assert found["finite"]
    assert found["identity"]
    assert found["infinite"]
