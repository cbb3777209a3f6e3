"""Attention as it was captured: maps and relations against naive loops, clean of what is padded."""

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_distill.attention import Heads, Kind
from llm_distill.queries import Queries, sample_queries
from llm_distill.rows import valid_rows
from tests import reference


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


B, H, KV, T, WIDTH = 3, 4, 2, 7, 5
LENGTHS = (7, 4, 5)


def queries(most: int | None = None) -> Queries:
    """Real positions of sequences of LENGTHS, padded on the right."""
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    rows = valid_rows(torch.arange(B * T).view(B, T), mask)
    return sample_queries(rows, range(B), most=most, seed=0, epoch=0)


def heads(
    *, most: int | None = None, softcap: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Heads, Tensor, Queries]:
    """Heads at sampled positions, where keys are visible `[B, R, T]`, and those positions."""
    asked = queries(most)
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    visible = real[:, None, :] & (torch.arange(T) <= asked.position[:, :, None])
    every = random(B, H, T, WIDTH, dtype=dtype)
    place = asked.position[:, None, :, None].expand(-1, H, -1, WIDTH)
    attention = Heads(
        query=every.gather(2, place),
        key=random(B, KV, T, WIDTH, seed=1, dtype=dtype),
        mask=visible[:, None],
        scaling=WIDTH**-0.5,
        softcap=softcap,
    )
    return attention, visible, asked


def naive(attention: Heads, bias: Tensor, asked: Queries) -> Tensor:
    """The maps of all queries that count, `[n, H, T]`, sequence by sequence."""
    found = []
    for number, count in enumerate(asked.per_sequence):
        maps = reference.attention(
            attention.query[number].double().numpy(),
            attention.key[number].double().numpy(),
            bias[number].double().numpy(),
            attention.scaling,
            attention.softcap,
        )
        found.append(maps[:count])
    return torch.from_numpy(np.concatenate(found))


def bias_of(visible: Tensor) -> Tensor:
    """0 at visible keys, -inf elsewhere: `[B, H, R, T]`."""
    return torch.where(visible, 0.0, -math.inf)[:, None].expand(-1, H, -1, -1)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("most", [None, 3])
def test_maps_match_the_reference(most: int | None, softcap: float | None) -> None:
    attention, visible, asked = heads(most=most, softcap=softcap)
    maps = attention.maps(asked)
    torch.testing.assert_close(maps, naive(attention, bias_of(visible), asked))
    torch.testing.assert_close(maps.sum(-1), torch.ones(len(asked), H, dtype=torch.float64))
    unseen = ~visible.flatten(0, 1)[asked.flat]
    assert maps.transpose(0, 1)[:, unseen].abs().max() == 0


def test_maps_without_a_mask_see_everything() -> None:
    attention, visible, asked = heads()
    bare = replace(attention, mask=None)
    expected = naive(bare, bias_of(torch.ones_like(visible)), asked)
    torch.testing.assert_close(bare.maps(asked), expected)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, -65504.0])
def test_an_additive_mask_is_a_boolean_one(hidden: float) -> None:
    attention, visible, asked = heads()
    additive = torch.where(visible, 0.0, hidden)[:, None]
    maps = replace(attention, mask=additive).maps(asked)
    assert torch.equal(maps, attention.maps(asked))


def test_biases_of_an_additive_mask_count() -> None:
    attention, visible, asked = heads()
    bias = random(B, H, asked.position.shape[1], T, seed=2) + bias_of(visible)
    biased = replace(attention, mask=bias)
    torch.testing.assert_close(biased.maps(asked), naive(attention, bias, asked))


@pytest.mark.parametrize("additive", [True, False])
def test_the_gradient_of_maps_is_right_and_finite(additive: bool) -> None:
    attention, visible, asked = heads(most=2)
    mask = torch.where(visible, 0.0, -math.inf)[:, None] if additive else visible[:, None]
    masked = replace(attention, mask=mask)

    def maps(query: Tensor, key: Tensor) -> Tensor:
        return replace(masked, query=query, key=key).maps(asked)

    inputs = attention.query.requires_grad_(), attention.key.requires_grad_()
    assert torch.autograd.gradcheck(maps, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maps_are_computed_in_fp32(dtype: torch.dtype) -> None:
    attention, visible, asked = heads(dtype=dtype)
    maps = attention.maps(asked)
    assert maps.dtype == torch.float32
    expected = naive(attention, bias_of(visible), asked)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite() -> None:
    attention, visible, asked = heads()
    blind = replace(attention, mask=torch.zeros_like(visible)[:, None])
    torch.testing.assert_close(
        blind.maps(asked), torch.full((len(asked), H, T), 1 / T, dtype=torch.float64)
    )


def test_no_queries_give_no_maps_with_a_graph() -> None:
    attention = heads()[0]
    nothing = sample_queries(
        valid_rows(torch.zeros(B, T).long(), torch.zeros(B, T)),
        range(B),
        most=None,
        seed=0,
        epoch=0,
    )
    query = attention.query[:, :, :1].requires_grad_()
    maps = replace(attention, query=query, mask=None).maps(nothing)
    assert maps.shape == (0, H, T)
    maps.sum().backward()
    assert query.grad is not None
    assert not query.grad.any()


def poisoned(attention: Heads, asked: Queries, poison: float) -> Heads:
    """Anything at padded keys, and in query rows that do not count."""
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    pads, idle = ~real[:, None, :, None], ~asked.used[:, None, :, None]
    changed = {"query": idle, "key": pads, "value": pads, "whole_query": pads}
    given: dict[str, Any] = {}
    for name, where in changed.items():
        vectors = {
            "query": attention.query,
            "key": attention.key,
            "value": attention.value,
            "whole_query": attention.whole_query,
        }[name]
        given[name] = None if vectors is None else vectors.detach().masked_fill(where, poison)
    return replace(attention, **given)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("most", [None, 6])
def test_maps_do_not_see_what_is_padded(most: int | None, additive: bool, poison: float) -> None:
    attention, visible, asked = heads(most=most)
    if additive:
        mask = torch.where(visible, 0.0, -math.inf)[:, None]
        attention = replace(attention, mask=mask)
    results = []
    for given in (attention, poisoned(attention, asked, poison)):
        query, key = given.query.clone().requires_grad_(), given.key.clone().requires_grad_()
        maps = replace(given, query=query, key=key).maps(asked)
        maps.square().sum().backward()
        assert query.grad is not None
        assert key.grad is not None
        results.append((maps.detach(), query.grad, key.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()


def whole(*, width: int = 6) -> tuple[Heads, Tensor, Queries]:
    """Heads with whole queries and values."""
    attention, visible, asked = heads(most=4)
    query = random(B, H, T, width, seed=4)
    place = asked.position[:, None, :, None].expand(-1, H, -1, width)
    changes: dict[str, Any] = {
        "query": query.gather(2, place),
        "whole_query": query,
        "key": random(B, KV, T, width, seed=5),
        "value": random(B, KV, T, width, seed=6),
    }
    return replace(attention, **changes), visible, asked


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("split", [1, 2, 3, 4])
def test_relations_match_the_reference(kind: Kind, split: int) -> None:
    attention, visible, asked = whole()
    maps = attention.relation(kind, split, asked).maps(asked)
    vectors = {"query": attention.whole_query, "key": attention.key, "value": attention.value}[kind]
    assert vectors is not None
    expected = []
    for number, count in enumerate(asked.per_sequence):
        joined = vectors[number].transpose(0, 1).flatten(1).numpy()
        for place in range(count):
            position = int(asked.position[number, place])
            seen = visible[number, place].numpy()
            expected.append(reference.relation(joined, position, seen, split))
    torch.testing.assert_close(maps, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_relations_do_not_see_what_is_padded(kind: Kind) -> None:
    attention, _, asked = whole()
    clean = attention.relation(kind, 2, asked).maps(asked)
    dirty = poisoned(attention, asked, math.nan).relation(kind, 2, asked).maps(asked)
    assert torch.equal(clean, dirty)


def test_a_mask_of_each_head_hides_from_relations_what_no_head_sees() -> None:
    attention, visible, asked = whole()
    slopes = torch.arange(H, dtype=torch.float64)[:, None, None]
    mask = torch.where(visible[:, None], -slopes, -math.inf)
    given = replace(attention, mask=mask).relation("key", 2, asked)
    assert given.visible is not None
    assert torch.equal(given.visible, visible[:, None])


def test_relations_that_were_not_asked_for() -> None:
    attention, _, asked = heads()
    with pytest.raises(LookupError, match="whole value vectors were not asked for; put the block"):
        attention.relation("value", 2, asked)


def test_relation_heads_that_do_not_divide() -> None:
    attention, _, asked = whole()
    with pytest.raises(ValueError, match="5 relation heads do not divide the query width 24"):
        attention.relation("query", 5, asked)
