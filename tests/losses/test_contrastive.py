"""InfoNCE: closed forms, candidates of other ranks, queues, blocked negatives."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill.losses.contrastive import info_nce
from tests import reference, reference_features
from tests.losses.feature_catalogue import slope


def embeddings(rows: int, width: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def check_against_the_reference(student: Tensor, teacher: Tensor, **settings: Any) -> None:
    def numpy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(numpy, value))
        return value.numpy() if isinstance(value, Tensor) else value

    given = {name: numpy(value) for name, value in settings.items()}

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return info_nce(student, teacher, temperature=0.3, **settings)

    def naive(student: reference.Array) -> reference.Array:
        return reference_features.info_nce(student, teacher.numpy(), temperature=0.3, **given)

    expected = torch.from_numpy(naive(student.numpy()))
    torch.testing.assert_close(loss(student, teacher), expected)
    gradient = reference.gradient(naive, student.numpy())
    torch.testing.assert_close(
        slope(loss, student, teacher), torch.from_numpy(gradient), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_aligned_embeddings_at_right_angles(temperature: float) -> None:
    values = info_nce(torch.eye(16).double(), torch.eye(16).double(), temperature=temperature)
    expected = math.log1p(15 * math.exp(-1 / temperature))
    assert values.tolist() == pytest.approx([expected] * 16)
    if temperature == 0.1:
        assert expected == pytest.approx(6.8077e-4, abs=1e-8)


def test_collapsed_embeddings_read_the_log_of_their_number() -> None:
    values = info_nce(torch.ones(16, 3), torch.ones(16, 3))
    assert values.tolist() == pytest.approx([2.772589] * 16, abs=1e-5)


def test_logits_are_taken_in_fp32() -> None:
    low = embeddings(20).bfloat16()
    assert torch.equal(info_nce(low, low), info_nce(low.float(), low.float()))


def test_an_anchor_without_other_candidates_reads_zero() -> None:
    student, teacher = embeddings(1), embeddings(1, seed=1)
    assert info_nce(student, teacher).tolist() == [0.0]
    assert slope(info_nce, student, teacher).abs().max() == 0


def test_a_queue_is_something_to_choose_from() -> None:
    student, teacher = embeddings(1), embeddings(1, seed=1)
    loss = partial(info_nce, queue=embeddings(5, seed=2))
    assert loss(student, teacher).item() > 0
    assert slope(loss, student, teacher).abs().max() > 0


def test_candidates_of_all_ranks_match_the_reference() -> None:
    students, teachers = embeddings(7), embeddings(7, seed=1)
    check_against_the_reference(
        students[2:5], teachers[2:5], candidates=(students, teachers), offset=2
    )


def test_ranks_together_are_one_batch() -> None:
    students, teachers = embeddings(7), embeddings(7, seed=1)
    parts = [
        info_nce(students[a:b], teachers[a:b], candidates=(students, teachers), offset=a)
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(torch.cat(parts), info_nce(students, teachers))


def test_queues_match_the_reference() -> None:
    check_against_the_reference(embeddings(4), embeddings(4, seed=1), queue=embeddings(6, seed=2))


@pytest.mark.parametrize("columns", [6, 9])
def test_blocked_candidates_match_the_reference(columns: int) -> None:
    students, teachers = embeddings(6), embeddings(6, seed=1)
    blocked = torch.rand(4, columns, generator=torch.Generator().manual_seed(3)) < 0.5
    check_against_the_reference(
        students[1:5],
        teachers[1:5],
        candidates=(students, teachers),
        offset=1,
        queue=embeddings(3, seed=2),
        blocked=blocked,
    )


def test_the_own_pair_is_never_blocked() -> None:
    student, teacher = embeddings(4), embeddings(4, seed=1)
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert info_nce(student, teacher, blocked=everything).tolist() == [0.0] * 4
    gradient = slope(partial(info_nce, blocked=everything), student, teacher)
    assert gradient.abs().max() == 0
    own = torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(info_nce(student, teacher, blocked=own), info_nce(student, teacher))


def test_blocking_duplicates_takes_their_cost_away() -> None:
    once = torch.eye(4).double()
    twice = once.repeat(2, 1)
    same = torch.eye(4, dtype=torch.bool).repeat(2, 2)
    assert info_nce(twice, twice).min() > 0.6
    expected = math.log1p(6 * math.exp(-1 / 0.07))
    assert info_nce(twice, twice, blocked=same).tolist() == pytest.approx([expected] * 8)


def test_embeddings_of_other_students_get_gradients() -> None:
    students, teachers = embeddings(6).requires_grad_(), embeddings(6, seed=1)
    info_nce(students[:3], teachers[:3], candidates=(students, teachers)).sum().backward()
    assert students.grad is not None
    assert students.grad[3:].abs().max() > 0


def test_nothing_is_read_on_the_host() -> None:
    def meta(rows: int) -> Tensor:
        return torch.empty(rows, 8, device="meta")

    values = info_nce(
        meta(3),
        meta(3),
        candidates=(meta(7), meta(7)),
        offset=2,
        queue=meta(5),
        blocked=torch.empty(3, 7, dtype=torch.bool, device="meta"),
    )
    assert values.shape == (3,)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_temperatures_that_are_none_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"info_nce: temperature=.* is not above 0; CRD takes"):
        info_nce(torch.eye(2), torch.eye(2), temperature=temperature)


@pytest.mark.parametrize("offset", [-1, 3])
def test_anchors_outside_their_candidates_are_refused(offset: int) -> None:
    every = torch.eye(4)
    with pytest.raises(ValueError, match=rf"info_nce: 2 anchors from offset {offset} do not fit"):
        info_nce(every[:2], every[:2], candidates=(every, every), offset=offset)


def test_masks_of_another_shape_are_refused() -> None:
    blocked = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"blocked is \[2, 3\]; for 2 anchors, 2 candidates and"):
        info_nce(torch.eye(2), torch.eye(2), blocked=blocked)
