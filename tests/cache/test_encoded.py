"""Bytes of one example, and sums of what was lost."""

import numpy as np
import pytest

from llm_distill.cache.encoded import Encoded, Fidelity


def test_columns_as_tables() -> None:
    halves = np.array([[0.5, 1.0], [2.0, -4.0]], np.float16)
    given = Encoded(2, 3, {"a": np.arange(6, dtype=np.uint8), "b": halves.view(np.uint8).ravel()})
    assert given.table("a", 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert given.halves("b", 2).tolist() == halves.tolist()


def test_a_column_of_another_size_is_no_table() -> None:
    with pytest.raises(ValueError, match="reshape"):
        Encoded(2, 3, {"a": np.arange(5, dtype=np.uint8)}).table("a", 3)


def test_sums_and_means() -> None:
    total = Fidelity(1, 0.5, 0.5, 0.9, 2.0, 3.0) + Fidelity(3, 0.5, 0.2, 2.7, 2.0, 5.0)
    assert total.means() == {"kl": 0.25, "mass": 0.9, "entropy": 1.0, "nll": 2.0, "worst": 0.5}
    assert Fidelity().means()["kl"] == 0.0
