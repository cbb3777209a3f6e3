"""Groups of rows: what a loss that compares rows with each other checks first."""

from torch import Tensor

from llm_distill.losses.softmax import wide

__all__ = ["check_rows", "is_small", "silent"]


def check_rows(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse other rows of one model than of the other: one row would be taken for many.

    Raises:
        ValueError: If the two models have different numbers of rows.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"{loss}: {len(student)} rows of the student and {len(teacher)} of the teacher; give "
            "the same items of both (only their widths may differ)"
        )


def is_small(loss: str, student: Tensor, teacher: Tensor, least: int) -> bool:
    """Whether a group has too few rows to say anything: `[N, D], [N, D'] -> bool`.

    Raises:
        ValueError: If the two models have different numbers of rows.

    >>> is_small("pkt", Tensor([[1.0], [2.0]]), Tensor([[1.0, 2.0], [3.0, 4.0]]), least=3)
    True
    """
    check_rows(loss, student, teacher)
    return len(student) < least


def silent(student: Tensor) -> Tensor:
    """What a group too small says: 0 with a gradient of 0, for rows of NaN too: `[N, D] -> [N]`.

    >>> silent(Tensor([[float("nan"), 1.0]]))
    tensor([0.])
    """
    return wide(student)[:, :0].sum(-1)
