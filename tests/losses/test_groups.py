"""Groups too small, and groups that do not belong together."""

import pytest
import torch

from llm_distill.losses.groups import check_rows, is_small, silent


def test_a_group_is_small_below_its_least() -> None:
    for rows in range(4):
        assert is_small("pkt", torch.ones(rows, 5), torch.ones(rows, 2), least=2) is (rows < 2)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nst: 3 rows of the student and 1 of the teacher; give"):
        check_rows("nst", torch.ones(3, 5), torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"nst: 1 rows of the student and 3 of the teacher"):
        is_small("nst", torch.ones(1, 5), torch.ones(3, 5), least=2)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_silence_has_a_graph_and_no_gradient(rows: int) -> None:
    student = torch.full((rows, 4), torch.nan, dtype=torch.bfloat16, requires_grad=True)
    values = silent(student)
    assert values.dtype == torch.float32
    assert values.tolist() == [0.0] * rows
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0] * 4] * rows
