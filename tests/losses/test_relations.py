"""Relations of items: closed forms, what published code does otherwise, precision, memory."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_distill.losses import relations
from llm_distill.losses.relations import cka, pkt, rkd_angle, rkd_distance, unbiased_cka
from tests import reference_features
from tests.losses.feature_catalogue import Loss, Naive, slope, states

RIGHT = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
EQUAL = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
NAIVE: dict[Loss, Naive] = {
    rkd_distance: reference_features.rkd_distance,
    rkd_angle: reference_features.rkd_angle,
}

every_rkd = pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
every_relation = pytest.mark.parametrize("loss", [pkt, rkd_distance, rkd_angle, cka])


def items(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def turned(x: Tensor, scale: float = 2.0, shift: float = 5.0) -> Tensor:
    turn: Tensor = torch.linalg.qr(items(x.shape[1], x.shape[1], seed=9))[0]
    return scale * x @ turn + shift


@every_relation
def test_turning_scaling_and_moving_a_model_leaves_zero(loss: Loss) -> None:
    x = items(20, 8)
    assert loss(turned(x), x).abs().max() < 1e-14
    assert slope(loss, turned(x), x).abs().max() < 1e-7


@every_relation
def test_wider_models_with_equal_relations_read_zero(loss: Loss) -> None:
    x = items(20, 8)
    assert loss(torch.cat([x, torch.zeros(20, 5)], dim=1), x).abs().max() < 1e-14


def test_a_right_triangle_and_an_even_one() -> None:
    distance, angle = rkd_distance(EQUAL, RIGHT).mean(), rkd_angle(EQUAL, RIGHT).mean()
    assert distance.item() == pytest.approx(0.0208333, abs=1e-7)
    assert angle.item() == pytest.approx(0.0583333, abs=1e-7)
    # Published code counts the diagonal, and triples that repeat an item, as equal.
    assert distance.item() * 2 / 3 == pytest.approx(0.0138889, abs=1e-7)
    assert angle.item() * 2 / 9 == pytest.approx(0.0129630, abs=1e-7)


def test_angles_at_each_vertex_are_their_own_row() -> None:
    expected = [0.5 * (0.5 - cosine) ** 2 for cosine in (0.0, 0.6, 0.8)]
    assert rkd_angle(EQUAL, RIGHT).tolist() == pytest.approx(expected)


@every_rkd
def test_a_mirror_image_has_the_same_relations(loss: Loss) -> None:
    assert loss(RIGHT * torch.tensor([-1.0, 1.0]), RIGHT).abs().max() < 1e-30


@every_rkd
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_equal_items_match_the_reference(loss: Loss, where: str) -> None:
    student, teacher = (side.detach() for side in states())
    if where != "teacher":
        student[1] = student[4]
    if where != "student":
        teacher[1] = teacher[3]
    naive = NAIVE[loss]
    expected = torch.from_numpy(naive(student.numpy(), teacher.numpy()))
    torch.testing.assert_close(loss(student, teacher), expected)
    assert slope(loss, student, teacher).isfinite().all()


def test_two_items_say_nothing_about_distances() -> None:
    student, teacher = states(rows=2)
    assert rkd_distance(student, teacher).tolist() == [0.0, 0.0]


@every_rkd
def test_distances_keep_their_digits_beside_an_offset(loss: Loss) -> None:
    # The usual |a|^2 + |b|^2 - 2ab in fp32, not centred, sets an item 1.22 apart from itself.
    student, teacher = (side.detach() for side in states(rows=20))
    low = (student + 100).float(), (teacher + 100).float()
    exact = loss(*(side.double() for side in low))
    torch.testing.assert_close(loss(*low).double(), exact, rtol=1e-5, atol=1e-9)


@every_rkd
def test_items_very_close_to_each_other_have_exact_relations(loss: Loss) -> None:
    student, teacher = (side.detach().float() for side in states(rows=8))
    for side in (student, teacher):
        side[1] = side[0] * (1 + 1e-4)
    exact = loss(student.double(), teacher.double())
    torch.testing.assert_close(loss(student, teacher).double(), exact, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        slope(loss, student, teacher).double(),
        slope(loss, student.double(), teacher.double()),
        rtol=1e-3,
        atol=1e-6,
    )


@every_rkd
@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf, math.nan])
def test_thresholds_without_a_square_are_refused(loss: Callable[..., Tensor], delta: float) -> None:
    with pytest.raises(ValueError, match=rf"rkd_\w+: delta={delta} is not inside \(0, inf\)"):
        loss(*states(), delta=delta)


def test_the_number_of_vertices_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = states(rows=7)
    values, gradient = rkd_angle(student, teacher), slope(rkd_angle, student, teacher)
    for at_once in (1, 2 * 49, 3 * 49):
        monkeypatch.setattr(relations, "AT_ONCE", at_once)
        torch.testing.assert_close(rkd_angle(student, teacher), values)
        torch.testing.assert_close(slope(rkd_angle, student, teacher), gradient)


def test_angles_are_not_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    rows = 64
    student, teacher = states(rows=rows, width=8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rkd_angle(student, teacher)
    assert max(kept) <= rows**2
    assert sum(kept) < rows**3 / 4


def test_two_items_are_each_other_s_only_neighbour() -> None:
    student, teacher = states(rows=2)
    assert pkt(student, teacher).tolist() == [0.0, 0.0]


def test_pkt_does_not_shrink_with_the_group() -> None:
    # With the diagonal and the mean over N^2 pairs it falls like 1 / N: hence weights of 30000.
    values = []
    for rows in (16, 256):
        teacher = items(rows, 32)
        values.append(pkt(teacher + items(rows, 32, seed=1), teacher).mean().item())
    assert values[1] == pytest.approx(values[0], rel=0.2)


def test_pkt_sees_what_all_items_have_in_common_pass_by() -> None:
    student, teacher = (side.detach() for side in states(rows=20))
    before = pkt(student, teacher)
    assert before.mean() > 1e-2
    torch.testing.assert_close(pkt(student + 300, teacher - 200), before)


def test_an_item_at_the_mean_is_nobody_s_neighbour() -> None:
    student, teacher = (side.detach() for side in states(rows=7))
    student[6] = student[:6].mean(0)

    def neighbours(x: Tensor) -> Tensor:
        x = (x - x.mean(0))[:6]
        kernel = (torch.cosine_similarity(x[:, None], x[None], dim=-1) + 1) / 2
        kernel = kernel - kernel.diagonal().diag()
        return kernel / kernel.sum(-1, keepdim=True)

    p, q = neighbours(teacher), neighbours(student)
    expected = torch.where(p > 0, p * (p / q.clamp_min(1e-12)).log(), 0.0).sum(-1)
    values = pkt(student, teacher)
    torch.testing.assert_close(values[:6], expected)
    assert values[6] == 0
    assert slope(pkt, student, teacher).isfinite().all()


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2])
def test_opposite_items_of_the_student_have_a_bounded_gradient(apart: float) -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, apart], [0.0, 1.0], [0.0, -1.0]])
    teacher = items(4, 2).float()
    assert pkt(student, teacher).isfinite().all()
    assert slope(pkt, student, teacher).abs().max() < 1e3


def test_cka_is_the_estimate_of_song() -> None:
    x, y = items(9, 5), items(9, 3, seed=1)
    expected = reference_features.unbiased_cka(x.numpy(), y.numpy())
    assert unbiased_cka(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert cka(x, y).mean().item() == pytest.approx(1 - expected, rel=1e-12)


def test_unbiased_cka_of_independent_features_is_zero() -> None:
    found = [
        unbiased_cka(items(64, 768, seed), items(64, 512, seed + 100)).item() for seed in range(8)
    ]
    x, y = items(64, 768), items(64, 512, seed=100)
    x, y = x - x.mean(0), y - y.mean(0)
    biased = (x.mT @ y).norm() ** 2 / (x.mT @ x).norm() / (y.mT @ y).norm()
    assert biased > 0.85
    assert max(map(abs, found)) < 0.05
    assert abs(sum(found) / len(found)) < 0.015


def test_one_token_that_both_models_blow_up_is_all_that_cka_sees() -> None:
    # Sinks are taken out before: this says why.
    x, y = items(64, 48), items(64, 32, seed=1)
    x[0::16] += 1e3
    y[0::16] += 1e3
    assert unbiased_cka(x, y) > 0.99


def test_cka_sees_invertible_maps_that_are_not_rigid() -> None:
    x = items(30, 6)
    assert unbiased_cka(x * torch.tensor([1.0, 1, 1, 1, 1, 20]), x) < 0.9
    assert unbiased_cka(turned(x), x).item() == pytest.approx(1, abs=1e-12)


def test_cka_of_models_without_structure() -> None:
    same, other = torch.full((6, 3), 7.1), items(6, 4).float()
    assert unbiased_cka(same, other) == 0
    assert cka(same, other).mean().item() == pytest.approx(0.5)
    assert cka(same, torch.ones(6, 2)).tolist() == [0.0] * 6
    assert slope(cka, same, other).abs().max() == 0
    alone = torch.zeros(6, 3)
    alone[2] = 1.0  # one item beside all others: nothing is left off the diagonal
    assert cka(alone, other).isfinite().all()
    assert slope(cka, alone, other).isfinite().all()


def test_cka_of_too_few_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unbiased_cka: 3 rows say nothing; give 4 or more"):
        unbiased_cka(items(3, 4), items(3, 4))
    with pytest.raises(ValueError, match=r"unbiased_cka: 5 rows of the student and 4 of"):
        unbiased_cka(items(5, 4), items(4, 4))
