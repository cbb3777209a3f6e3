"""What holds for every loss between hidden states, from one table (`feature_catalogue`)."""

import pytest
import torch
from torch import Tensor

from llm_distill.losses.needs import needs
from tests import reference
from tests.losses.feature_catalogue import (
    CHANGES,
    Case,
    changed,
    every_case,
    every_group,
    every_pull,
    every_relation,
    slope,
    states,
)


def expected_values(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    return torch.from_numpy(case.naive(student.detach().numpy(), teacher.detach().numpy()))


def expected_slope(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    at, fixed = student.detach().numpy(), teacher.numpy()
    return torch.from_numpy(reference.gradient(lambda moved: case.naive(moved, fixed), at))


def check_against_the_reference(case: Case, student: Tensor, teacher: Tensor) -> None:
    values = expected_values(case, student, teacher)
    assert values.mean() > 1e-3  # a loss that reads 0 would make every formula right
    torch.testing.assert_close(case.loss(student, teacher).detach(), values, rtol=1e-11, atol=1e-13)
    gradient = expected_slope(case, student, teacher)
    assert gradient.abs().amax() > 1e-4
    torch.testing.assert_close(slope(case.loss, student, teacher), gradient, rtol=1e-6, atol=1e-9)


@every_case
def test_values_and_gradients_match_the_reference(case: Case) -> None:
    check_against_the_reference(case, *states())


@every_relation
def test_widths_may_differ(case: Case) -> None:
    check_against_the_reference(case, *states(rows=5, width=3, other=6))


@every_case
def test_gradcheck(case: Case) -> None:
    student, teacher = states(rows=5, width=4)
    assert torch.autograd.gradcheck(case.loss, (student, teacher.requires_grad_()))


@every_pull
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equal_states_read_zero_with_a_zero_gradient(
    case: Case, dtype: torch.dtype, most: float
) -> None:
    same = states(rows=40, width=30)[1].to(dtype)
    assert case.loss(same, same).abs().max() <= most
    assert slope(case.loss, same, same).abs().max() <= most


@every_pull
def test_equal_states_with_zeros_and_duplicates_too(case: Case) -> None:
    same = states(rows=12)[1].float()
    same[2] = 0.0
    same[7] = same[5] = same[6]
    assert case.loss(same, same).abs().max() <= 1e-6
    assert slope(case.loss, same, same).abs().max() <= 1e-6


@every_case
@pytest.mark.parametrize("apart", [1e-9, 1e-3, 1.0, 100.0])
def test_never_negative_beyond_rounding(case: Case, apart: float) -> None:
    student, teacher = states(rows=50)
    near = teacher + apart * student.detach()
    assert case.loss(near, teacher).min() >= -1e-14
    assert case.loss(near.float(), teacher.float()).min() >= -1e-6


@every_case
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_ignored_changes_nothing_and_all_else_is_seen(case: Case, change: str) -> None:
    student, teacher = (side.detach() for side in states())
    for ours, theirs in ((changed(student, change), teacher), (student, changed(teacher, change))):
        moved, still = case.loss(ours, theirs), case.loss(student, teacher)
        if change in case.ignores:
            torch.testing.assert_close(moved, still, rtol=1e-9, atol=1e-12)
        else:
            assert (moved - still).abs().max() > 1e-4


@every_case
def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    student, teacher = states()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        case.loss(student[order], teacher[order]), case.loss(student, teacher)[order]
    )


@every_case
def test_the_order_of_neurons_does_not_matter_when_both_change(case: Case) -> None:
    student, teacher = states()
    order = torch.tensor([3, 0, 1, 4, 2])
    torch.testing.assert_close(
        case.loss(student[:, order], teacher[:, order]), case.loss(student, teacher)
    )


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_what_the_inputs_lost(case: Case, dtype: torch.dtype) -> None:
    student, teacher = states(rows=30, width=16)
    low = student.detach().to(dtype), teacher.to(dtype)
    values = case.loss(*low)
    assert values.dtype == torch.float32
    assert torch.equal(values, case.loss(low[0].float(), low[1].float()))
    exact = case.loss(student, teacher).detach()
    torch.testing.assert_close(values.double(), exact, rtol=2e-2, atol=2e-2 * exact.max().item())
    assert slope(case.loss, *low).dtype == dtype


@every_case
def test_fp32_keeps_its_digits_beside_a_large_common_part(case: Case) -> None:
    student, teacher = (side.detach() for side in states(rows=12))
    if "shift" in case.ignores:
        student, teacher = student + 100, teacher + 100
    low = student.float(), teacher.float()
    exact = low[0].double(), low[1].double()
    torch.testing.assert_close(
        case.loss(*low).double(), case.loss(*exact), rtol=1e-3, atol=1e-6, msg=None
    )
    torch.testing.assert_close(
        slope(case.loss, *low).double(), slope(case.loss, *exact), rtol=1e-3, atol=1e-5
    )


@every_case
def test_no_rows_are_empty_with_a_graph(case: Case) -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    values = case.loss(student, torch.zeros(0, 7))
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@every_group
def test_a_group_too_small_reads_zero_with_a_graph(case: Case) -> None:
    for rows in range(1, needs(case.loss).least):
        student, teacher = states(rows=rows)
        values = case.loss(student.float(), teacher.float())
        assert values.dtype == torch.float32
        assert values.tolist() == [0.0] * rows
        assert slope(case.loss, student, teacher).abs().max() == 0


@every_group
def test_the_least_group_says_something(case: Case) -> None:
    assert case.loss(*states(rows=needs(case.loss).least)).mean() > 1e-3


@every_case
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("fault", ["zeros", "duplicates", "all zero", "all equal", "all but one"])
def test_degenerate_rows_stay_finite(case: Case, where: str, fault: str) -> None:
    student, teacher = (side.detach().float() + 100 for side in states(rows=8))
    for side in [student] * (where != "teacher") + [teacher] * (where != "student"):
        match fault:
            case "zeros":
                side[[1, 4]] = 0.0
            case "duplicates":
                side[2] = side[3] = side[7].clone()
            case "all zero":
                side[:] = 0.0
            case "all equal":
                side[:] = side[0].clone()
            case _:
                side[1:] = side[0].clone()
                side[0] += 1.0
    assert case.loss(student, teacher).isfinite().all()
    gradient = slope(case.loss, student, teacher)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e4


@every_case
def test_the_teacher_gets_no_gradient_it_does_not_ask_for(case: Case) -> None:
    student, teacher = states()
    case.loss(student, teacher).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@every_case
def test_inputs_are_left_as_they_were(case: Case) -> None:
    student, teacher = states()
    before = student.detach().clone(), teacher.clone()
    case.loss(student, teacher).sum().backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


@every_case
def test_nothing_is_read_on_the_host(case: Case) -> None:
    student = torch.empty(9, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    values = case.loss(student, torch.empty(9, 5, device="meta", dtype=torch.bfloat16))
    assert values.shape == (9,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (9, 5)


@every_case
def test_other_row_counts_are_refused(case: Case) -> None:
    for rows in ((5, 4), (4, 5)):
        with pytest.raises((RuntimeError, ValueError), match=r"size|rows"):
            case.loss(torch.ones(rows[0], 7), torch.ones(rows[1], 7))


@every_group
def test_one_row_is_no_group_of_many(case: Case) -> None:
    with pytest.raises(ValueError, match=r"6 rows of the student and 1 of the teacher"):
        case.loss(torch.ones(6, 7), torch.ones(1, 7))
