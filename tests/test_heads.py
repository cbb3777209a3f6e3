"""Head rules: averages, groups, and the assignment by data."""

import pytest
import torch
from torch import Tensor

from llm_distill.heads import best_match, check_group, check_match, group, match, mean


def maps(heads: int, *, rows: int = 5, keys: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, heads, keys, generator=generator)).softmax(-1)


def assert_maps(result: Tensor, shape: tuple[int, ...]) -> None:
    """The shape, and every row a distribution still."""
    assert result.shape == shape
    torch.testing.assert_close(result.sum(-1), torch.ones(shape[:-1]))
    assert result.min() >= 0


def test_mean_takes_any_counts() -> None:
    student, teacher = mean(maps(3), maps(8))
    assert_maps(student, (5, 1, 7))
    assert_maps(teacher, (5, 1, 7))
    torch.testing.assert_close(student[:, 0], maps(3).mean(1))


def test_mean_does_not_see_the_order_of_heads() -> None:
    teacher = maps(8)
    order = torch.randperm(8)
    torch.testing.assert_close(mean(maps(3), teacher[:, order])[1], mean(maps(3), teacher)[1])


@pytest.mark.parametrize(("student", "teacher"), [(2, 8), (8, 2), (4, 4), (1, 3)])
def test_group_averages_neighbours_of_the_larger(student: int, teacher: int) -> None:
    ours, theirs = maps(student), maps(teacher)
    few, size = min(student, teacher), max(student, teacher) // min(student, teacher)
    found = group(ours, theirs)
    for result, given in zip(found, (ours, theirs), strict=True):
        assert_maps(result, (5, few, 7))
        if given.shape[1] == few:
            assert torch.equal(result, given)
        else:
            torch.testing.assert_close(result[:, 0], given[:, :size].mean(1))
            torch.testing.assert_close(result[:, -1], given[:, -size:].mean(1))


@pytest.mark.parametrize(("student", "teacher"), [(3, 8), (8, 3)])
def test_group_refuses_counts_that_do_not_divide(student: int, teacher: int) -> None:
    message = f"student {student}, teacher {teacher}; use heads: mean"
    with pytest.raises(ValueError, match=message):
        group(maps(student), maps(teacher))
    with pytest.raises(ValueError, match=message):
        check_group(student, teacher)


def test_rules_take_no_rows() -> None:
    for rule in (mean, group):
        student, teacher = rule(torch.zeros(0, 2, 7), torch.zeros(0, 4, 7))
        assert student.shape[0] == teacher.shape[0] == 0
        assert student.shape[1] == teacher.shape[1]


def test_match_picks_the_assigned_heads() -> None:
    student, teacher = maps(2), maps(4)
    ours, theirs = match(student, teacher, assignment=torch.tensor([3, 1]))
    assert ours is student
    assert torch.equal(theirs, teacher[:, [3, 1]])


def test_best_match_recovers_a_planted_assignment() -> None:
    teacher, planted = maps(8, rows=20), torch.tensor([5, 0, 7, 2])
    student = 0.9 * teacher[:, planted] + 0.1 * maps(4, rows=20, seed=1)
    found = best_match(student, teacher)
    assert found.dtype == torch.long
    assert found.tolist() == planted.tolist()


def test_best_match_gives_each_student_head_its_own() -> None:
    teacher = maps(3)
    student = teacher[:, :1].expand(-1, 3, -1)
    assert sorted(best_match(student, teacher).tolist()) == [0, 1, 2]


def test_best_match_is_the_least_total_divergence() -> None:
    from itertools import permutations

    student, teacher = maps(3, seed=2), maps(4, seed=3)

    def cost(assignment: tuple[int, ...]) -> float:
        s, t = student.double(), teacher[:, list(assignment)].double()
        m = (s + t) / 2
        return float((s * (s / m).log() + t * (t / m).log()).sum())

    best = min(permutations(range(4), 3), key=cost)
    assert tuple(best_match(student, teacher).tolist()) == best


def test_best_match_reads_exact_zeros() -> None:
    teacher = torch.eye(4).expand(3, 4, 4)
    assert best_match(teacher[:, [2, 0, 3, 1]], teacher).tolist() == [2, 0, 3, 1]


def test_match_refuses_more_student_heads() -> None:
    message = "student 4, teacher 2; use heads: mean or group"
    with pytest.raises(ValueError, match=message):
        best_match(maps(4), maps(2))
    with pytest.raises(ValueError, match=message):
        check_match(4, 2)
    check_match(2, 2)
