"""Two distributions of a block, whatever is asked of them first."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from llm_distill.losses.pairs import Pair, Scratch, log_total
from llm_distill.losses.softmax import FLOOR
from tests.losses.catalogue import logits

CPU = torch.device("cpu")


def pair_of(student: Tensor, teacher: Tensor) -> Pair:
    scratch = Scratch(student.numel(), student.dtype, CPU)
    return Pair(student.detach().clone(), teacher.clone(), scratch)


class TestScratch:
    def test_a_purpose_has_one_buffer(self) -> None:
        scratch = Scratch(12, torch.float32, CPU)
        first, smaller = scratch("q", 3, 4), scratch("q", 2, 5)
        assert (first.shape, smaller.shape) == ((3, 4), (2, 5))
        assert first.data_ptr() == smaller.data_ptr()
        assert first.is_contiguous()
        assert smaller.is_contiguous()

    def test_two_purposes_share_nothing(self) -> None:
        scratch = Scratch(12, torch.float32, CPU)
        one, other = scratch("q", 3, 4).fill_(1.0), scratch("p", 3, 4).fill_(2.0)
        assert one.eq(1.0).all()
        assert other.eq(2.0).all()

    def test_dtype(self) -> None:
        assert Scratch(4, torch.float64, CPU)("q", 1, 4).dtype == torch.float64

    def test_more_than_there_is(self) -> None:
        with pytest.raises(RuntimeError, match="invalid for input of size 4"):
            Scratch(4, torch.float32, CPU)("q", 1, 5)


@pytest.mark.parametrize("order", list(permutations(("gap", "log_q", "log_p", "student_total"))))
def test_any_order_of_asking_gives_the_same(order: tuple[str, ...]) -> None:
    student, teacher = logits(6, 13)
    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    expected = {
        "q": log_q.exp(),
        "p": log_p.exp(),
        "log_q": log_q,
        "log_p": log_p,
        "gap": log_p - log_q,
        "student_total": student.detach().logsumexp(-1, keepdim=True),
    }
    pair = pair_of(student, teacher)
    asked = (*order, "q", "p")
    for name in [*asked, *asked]:  # and nobody has spoiled what another was told
        found = getattr(pair, name)
        found = sum(found) if name == "student_total" else found
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-13)


def test_logits_stay_until_their_logarithms_are_asked_for() -> None:
    """The values of the labels are read from them, after the gap was."""
    student, teacher = (z.detach().clone() for z in logits())
    kept = student.clone(), teacher.clone()
    pair = Pair(student, teacher, Scratch(student.numel(), torch.float64, CPU))
    assert pair.gap.shape == (5, 9)
    assert pair.student_total.top.shape == pair.student_total.rest.shape == (5, 1)
    assert torch.equal(student, kept[0])
    assert torch.equal(teacher, kept[1])
    assert pair.log_q is student
    assert pair.log_p is teacher


def test_for_a_sole_reader_the_gap_takes_the_teachers_place() -> None:
    student, teacher = (z.detach().clone() for z in logits())
    expected = pair_of(student, teacher)
    pair = Pair(student, teacher, Scratch(student.numel(), torch.float64, CPU), sole=True)
    assert torch.equal(pair.gap, expected.gap)
    assert pair.gap is teacher
    assert torch.equal(pair.p, expected.p)
    assert torch.equal(pair.student_total.top, expected.student_total.top)
    assert torch.equal(pair.student_total.rest, expected.student_total.rest)


def test_a_buffer_is_of_the_blocks_shape_and_apart() -> None:
    pair = pair_of(*logits(6, 13))
    _ = pair.gap
    kept = pair.q.clone(), pair.p.clone(), pair.gap.clone()
    assert pair.buffer("a").fill_(7.0).shape == (6, 13)
    assert all(torch.equal(*both) for both in zip(kept, (pair.q, pair.p, pair.gap), strict=True))


def test_tokens_both_forbid_have_no_gap() -> None:
    both = torch.tensor([[0.0, 1.0, FLOOR]]), torch.tensor([[1.0, 0.0, FLOOR]])
    pair = pair_of(*both)
    assert pair.q[0, 2] == pair.p[0, 2] == 0
    assert pair.gap[0, 2].abs() < 1
    assert pair.gap.isfinite().all()
    assert pair.log_q[0, 2] == pair.log_p[0, 2] == FLOOR


def test_a_row_that_forbids_everything_is_uniform() -> None:
    pair = pair_of(torch.full((1, 4), FLOOR), torch.zeros(1, 4))
    assert pair.q.tolist() == pair.p.tolist() == [[0.25] * 4]


@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(spoiled: int, broken: float) -> None:
    both = [z.detach().clone() for z in logits(3, 5)]
    both[spoiled][1, 2] = broken
    pair = pair_of(both[0], both[1])
    assert pair.gap.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("vocabulary", [1, 2, 20_000])
def test_log_total(size: float, vocabulary: int) -> None:
    """In fp32 as good as torch's own."""
    z = size * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    expected = z.double().logsumexp(-1, keepdim=True)
    total = log_total(z, z.softmax(-1))
    assert (total.top.double() + total.rest - expected).abs().max() < 2e-6  # whatever the size


def test_what_a_logit_lacks_of_the_total() -> None:
    """Relative to the largest, an offset of all logits takes no digits."""
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for offset in (0.0, 1e4):
        moved = (z.double() + offset).float()
        found = log_total(moved, moved.softmax(-1)).over(moved)
        torch.testing.assert_close(
            found, -moved.double().log_softmax(-1).float(), rtol=0, atol=1e-6
        )
