"""The pass over maps: its closed form against autograd, clean of pads, in any blocks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill import heads as head_rules
from llm_distill import map_kl, map_mse
from llm_distill.attention import Heads
from llm_distill.objectives import map_pass as module
from llm_distill.objectives.map_pass import map_pass
from llm_distill.queries import Queries, sample_queries
from llm_distill.rows import valid_rows

B, T, WIDTH = 4, 9, 5
LENGTHS = (9, 4, 0, 6)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def queries(side: str, most: int | None) -> Queries:
    """One sequence has no row at all."""
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    real = real if side == "right" else real.flip(1)
    return sample_queries(
        valid_rows(torch.zeros(B, T).long(), real), range(B), most=most, seed=0, epoch=0
    )


def captured(
    asked: Queries, side: str, *, heads: int, groups: int, seed: int, **changes: Any
) -> Heads:
    """One block, with the mask that sdpa gets: a query of padding may see everything."""
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    real = real if side == "right" else real.flip(1)
    visible = real[:, None, :] & (torch.arange(T) <= asked.position[:, :, None])
    visible = visible | ~visible.any(-1, keepdim=True)
    given: dict[str, Any] = {
        "query": random(B, heads, asked.position.shape[1], WIDTH, seed=seed),
        "key": random(B, groups, T, WIDTH, seed=seed + 1),
        "mask": visible[:, None],
        "scaling": WIDTH**-0.5,
    }
    return Heads(**given | changes)


def mean(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return head_rules.mean(ours, theirs[0])


def direct(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return ours, theirs[0]


def mixed(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return ours, 0.25 * theirs[0] + 0.75 * theirs[1]


def plain(
    student: Heads, teachers: Sequence[Heads], asked: Queries, loss: Any, sides: Any
) -> Tensor:
    """The same in one piece, through autograd."""
    others = [teacher.maps(asked).detach() for teacher in teachers]
    weight = asked.weight.flatten()[asked.flat]
    total: Tensor = (loss(*sides(student.maps(asked), others)) * weight).sum()
    return total


def scored(function: Any, student: Heads, *rest: Any) -> tuple[Tensor, ...]:
    """Value and gradients."""
    query, key = student.query.clone().requires_grad_(), student.key.clone().requires_grad_()
    value = function(replace(student, query=query, key=key), *rest)
    (3 * value).backward()
    assert query.grad is not None
    assert key.grad is not None
    return value.detach(), query.grad, key.grad


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("places", [1, 4, 13, 10_000])
@pytest.mark.parametrize("loss", [map_kl, map_mse])
@pytest.mark.parametrize("sides", [mean, direct, mixed])
def test_it_is_autograd_in_one_piece(
    sides: Any,
    loss: Any,
    places: int,
    most: int | None,
    side: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = queries(side, most)
    student = captured(asked, side, heads=4, groups=2, seed=0)
    teachers = [captured(asked, side, heads=4, groups=4, seed=10 * k) for k in (1, 2)]
    expected = scored(plain, student, teachers, asked, loss, sides)
    monkeypatch.setattr(module, "LEAST_ROWS", places)
    monkeypatch.setitem(module.BLOCK, "cpu", 1)
    found = scored(map_pass, student, teachers, asked, loss, sides)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert all(tensor.any() for tensor in found)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("bias", [None, "heads", "shared"])
def test_soft_caps_and_biases(softcap: float | None, bias: str | None) -> None:
    asked = queries("right", 3)
    changes: dict[str, Any] = {"softcap": softcap}
    if bias is not None:
        base = captured(asked, "right", heads=4, groups=2, seed=0)
        assert base.mask is not None
        heads = 4 if bias == "heads" else 1
        slopes = random(B, heads, base.mask.shape[2], T, seed=7)
        changes["mask"] = torch.where(base.mask, slopes, -math.inf)
    student = captured(asked, "right", heads=4, groups=2, seed=0, **changes)
    teacher = captured(asked, "right", heads=4, groups=2, seed=10, **changes)
    for sides in (mean, direct):
        expected = scored(plain, student, [teacher], asked, map_kl, sides)
        found = scored(map_pass, student, [teacher], asked, map_kl, sides)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sides", [mean, direct])
@pytest.mark.parametrize("loss", [map_kl, map_mse])
def test_gradcheck(sides: Any, loss: Any) -> None:
    asked = queries("right", 2)
    student = captured(asked, "right", heads=4, groups=2, seed=0)
    teacher = captured(asked, "right", heads=4, groups=4, seed=10)

    def function(query: Tensor, key: Tensor) -> Tensor:
        given = replace(student, query=query, key=key)
        return map_pass(given, [teacher], asked, loss, sides)

    inputs = student.query.requires_grad_(), student.key.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("loss", [map_kl, map_mse])
def test_pads_change_nothing(loss: Any, poison: float, side: str) -> None:
    """Whatever stands there in either model: the same bits, finite, and no gradient at all."""
    asked = queries(side, 5)
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    real = real if side == "right" else real.flip(1)
    pads, idle = ~real[:, None, :, None], ~asked.used[:, None, :, None]
    clean = [captured(asked, side, heads=4, groups=2, seed=seed) for seed in (0, 10)]
    dirty = [
        replace(c, query=c.query.masked_fill(idle, poison), key=c.key.masked_fill(pads, poison))
        for c in clean
    ]
    for sides in (mean, direct):
        first = scored(map_pass, clean[0], [clean[1]], asked, loss, sides)
        again = scored(map_pass, dirty[0], [dirty[1]], asked, loss, sides)
        for ours, theirs in zip(first, again, strict=True):
            assert torch.equal(ours, theirs)
            assert theirs.isfinite().all()
        assert not again[1].masked_select(idle).any()
        assert not again[2].masked_select(pads).any()


@pytest.mark.parametrize("loss", [map_kl, map_mse])
def test_a_block_is_at_no_distance_from_itself(loss: Any) -> None:
    asked = queries("right", None)
    student = captured(asked, "right", heads=4, groups=2, seed=0)
    for sides in (mean, direct):
        found = scored(map_pass, student, [student], asked, loss, sides)
        assert all(tensor.abs().max() < 1e-14 for tensor in found)


def test_all_maps_at_once_are_seen_by_a_loss_row_by_row() -> None:
    """A loss gets whole rows: as many as it gives values, and all keys."""
    asked = queries("right", 3)
    student = captured(asked, "right", heads=4, groups=2, seed=0)
    seen = []

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        seen.append((tuple(ours.shape), tuple(theirs.shape)))
        return (ours - theirs).abs().sum(-1).mean(-1)

    value = map_pass(student, [student], asked, loss, mean)
    assert seen == [((len(asked), 1, T), (len(asked), 1, T))]
    assert value.item() == 0.0


def test_no_rows_are_a_zero_with_a_graph() -> None:
    nothing = valid_rows(torch.zeros(B, T).long(), torch.zeros(B, T))
    asked = sample_queries(nothing, range(B), most=3, seed=0, epoch=0)
    student = captured(asked, "right", heads=4, groups=2, seed=0)
    value, *slopes = scored(map_pass, student, [student], asked, map_kl, direct)
    assert value.item() == 0.0
    assert not any(slope.any() for slope in slopes)


def test_without_a_gradient_nothing_is_kept() -> None:
    asked = queries("right", 3)
    student = captured(asked, "right", heads=4, groups=2, seed=0)
    student.query.requires_grad_()
    with torch.no_grad():
        value = map_pass(student, [student], asked, map_mse, direct)
    assert not value.requires_grad
    trained = map_pass(student, [student], asked, map_mse, direct)
    assert trained.requires_grad
    assert torch.equal(value, trained.detach())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_halves_are_computed_in_fp32(dtype: torch.dtype, bound: float) -> None:
    asked = queries("right", 3)
    wide = [captured(asked, "right", heads=4, groups=2, seed=seed) for seed in (0, 10)]
    halves = [replace(w, query=w.query.to(dtype), key=w.key.to(dtype)) for w in wide]
    found = scored(map_pass, halves[0], [halves[1]], asked, map_kl, mean)
    exact = [replace(h, query=h.query.double(), key=h.key.double()) for h in halves]
    expected = scored(map_pass, exact[0], [exact[1]], asked, map_kl, mean)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert (ours.double() - theirs).norm() < bound * theirs.norm()


def test_a_second_backward_is_refused() -> None:
    asked = queries("right", 3)
    student = captured(asked, "right", heads=4, groups=2, seed=0)
    student.query.requires_grad_()
    value = map_pass(student, [student], asked, map_mse, direct)
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_rules_with_an_assignment() -> None:
    """Matched heads leave the student's alone: the closed form is the way through autograd."""
    asked = queries("left", 4)
    student = captured(asked, "left", heads=4, groups=2, seed=0)
    teacher = captured(asked, "left", heads=6, groups=6, seed=10)
    rule = partial(head_rules.match, assignment=torch.tensor([5, 0, 2, 1]))

    def sides(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return rule(ours, theirs[0])

    expected = scored(plain, student, [teacher], asked, map_kl, sides)
    for ours, theirs in zip(
        scored(map_pass, student, [teacher], asked, map_kl, sides), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
