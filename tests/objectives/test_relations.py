"""Relations of queries, keys and values, against loops over what eager attention was given."""

import copy
import math
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill import layers as layer_maps
from llm_distill import map_mse
from llm_distill.attention import Heads
from llm_distill.capture import Reader
from llm_distill.layers import LayerMap, Row
from llm_distill.objectives import QueryPlan
from llm_distill.objectives.relations import Relations, RelationsTerm, default_heads, widths
from llm_distill.queries import Queries
from llm_distill.rows import Batch
from llm_distill.signals import ModelSpec, Request
from tests import reference, tiny
from tests.objectives.compare import STEP, batch, read, specs, value

FAMILIES = {
    "llama": lambda: (tiny.llama("student"), tiny.llama("teacher")),
    "qwen3": lambda: (tiny.llama("student"), tiny.qwen3(depth=4)),
    "gpt2": lambda: (tiny.gpt2(depth=2), tiny.gpt2(depth=3, width=64)),
    "bert": lambda: (tiny.bert(depth=2), tiny.bert(depth=3, width=64)),
}
ALL = Relations(rows="valid", queries=5, relation_heads=2)


def vectors(model: PreTrainedModel, given: Batch, patch: pytest.MonkeyPatch) -> list[Any]:
    """Queries, keys and values of every block, as eager attention gets them."""
    model.set_attn_implementation("eager")
    module = sys.modules[type(model).__module__]
    own: Any = vars(module)["eager_attention_forward"]
    found: list[Any] = []

    def spy(where: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        found.append({"query": query, "key": key, "value": value})
        return own(where, query, key, value, *rest, **more)

    patch.setattr(module, "eager_attention_forward", spy)
    model(**given.inputs)
    return found


def visible(given: Batch, sequence: int, position: int, *, causal: bool) -> np.ndarray:
    """Keys that a query sees."""
    real = given.inputs["attention_mask"][sequence].bool().numpy()
    return real & (np.arange(len(real)) <= position) if causal else real


def naive(student: Any, teacher: Any, given: Batch, *, heads: int, causal: bool) -> float:
    """The sum over query rows and kinds of the mean KL over relation heads."""
    assert given.queries is not None
    total = 0.0
    for sequence, count in enumerate(given.queries.per_sequence):
        for place in range(count):
            position = int(given.queries.position[sequence, place])
            seen = visible(given, sequence, position, causal=causal)
            for kind in ("query", "key", "value"):
                rows = [
                    reference.relation(joined(side[kind], sequence), position, seen, heads)
                    for side in (student, teacher)
                ]
                kl = reference.map_kl(rows[0][None], rows[1][None])[0]
                total += float(given.queries.weight[sequence, place]) * kl
    return total


def joined(tensor: Tensor, sequence: int) -> Any:
    """`[B, H, T, d] -> [T, H d]` of one sequence, in float64."""
    return tensor[sequence].detach().double().transpose(0, 1).flatten(1).numpy()


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_eager_attention_says(
    family: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = FAMILIES[family]()
    term = replace(ALL, relation_heads=heads).build(*specs(student, teacher))
    given = batch(term.queries)
    got = value(term, student, teacher, given).item()
    ours = vectors(copy.deepcopy(student), given, monkeypatch)[-1]
    theirs = vectors(copy.deepcopy(teacher), given, monkeypatch)[-1]
    expected = naive(ours, theirs, given, heads=heads, causal=family != "bert")
    assert got == pytest.approx(expected, rel=1e-4)
    assert got > 0.1


def dense(student: Any, teacher: Any, given: Batch, heads: int) -> Tensor:
    """The same in one piece, with a graph."""
    assert given.queries is not None
    real = given.inputs["attention_mask"].bool()
    size = real.shape[1]
    seen = real[:, None, None, :] & torch.ones(size, size).tril().bool()
    total = torch.zeros(())
    for kind in ("query", "key", "value"):
        logs = []
        for side in (student, teacher):
            split = side[kind].transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
            scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
            logs.append(scores.masked_fill(~seen, -1e30).log_softmax(-1))
        kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean(1)
        total = total + (kl.gather(1, given.queries.position) * given.queries.weight).sum()
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_eager_attention(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = FAMILIES["llama"]()
    twin = copy.deepcopy(student)
    term = ALL.build(*specs(student, teacher))
    given = batch(term.queries)
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
        student.train()
    reader = Reader(student, term.student, "student")
    with torch.no_grad():
        said = read(teacher, term.teacher, given)
    term(reader.read(given), said, given, STEP).backward()
    reader.release()
    theirs = vectors(copy.deepcopy(teacher), given, monkeypatch)[-1]
    detached = {kind: tensor.detach() for kind, tensor in theirs.items()}
    dense(vectors(twin, given, monkeypatch)[-1], detached, given, 2).backward()
    reached = 0
    for ours, expected in zip(student.parameters(), twin.parameters(), strict=True):
        if expected.grad is None:
            assert ours.grad is None
            continue
        assert ours.grad is not None
        assert torch.allclose(ours.grad, expected.grad, rtol=2e-3, atol=1e-4)
        reached += bool(expected.grad.any())
    assert reached > 10
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_model_is_at_no_distance_from_itself(teacher: PreTrainedModel) -> None:
    term = ALL.build(*specs(teacher, teacher))
    given = batch(term.queries)
    got = value(term, teacher, copy.deepcopy(teacher), given)
    got.backward()
    assert abs(got.item()) < 1e-4
    slopes = [p.grad for p in teacher.parameters() if p.grad is not None]
    assert slopes
    assert all(slope.isfinite().all() and slope.abs().max() < 1e-3 for slope in slopes)


class Bare:
    """Vectors of one block of a student and a teacher, without models."""

    def __init__(self, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.given = batch(QueryPlan(5, "valid"))
        size = self.given.inputs["input_ids"].shape
        self.queries = self.given.queries
        assert self.queries is not None
        self.real = self.given.inputs["attention_mask"].bool()
        self.vectors = [
            {
                kind: torch.randn(
                    size[0], count, size[1], 8, generator=generator, dtype=torch.float64
                )
                for kind, count in (("query", 4), ("key", 2), ("value", 2))
            }
            for _ in range(2)
        ]

    def heads(self, side: dict[str, Tensor]) -> Heads:
        """As they would be captured."""
        assert isinstance(self.queries, Queries)
        position = self.queries.position[:, None, :, None]
        query = side["query"].gather(2, position.expand(-1, 4, -1, 8))
        keys = torch.arange(self.real.shape[1])
        mask = self.real[:, None, None, :] & (keys <= position)
        return Heads(query, side["key"], mask, 1.0, None, side["value"], side["query"])

    def value(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """Of the last blocks."""
        spec = ModelSpec("m", "llama", 1, 32, 4, 16, kv_heads=2, head_dim=8, value_dim=8)
        term = ALL.build(spec, spec)
        said = read(tiny.llama("student"), Request(), self.given)
        ours = replace(said, attention={1: self.heads(student)})
        theirs = replace(said, attention={1: self.heads(teacher)})
        result: Tensor = term(ours, theirs, self.given, STEP)
        return result


def rotated(tensor: Tensor) -> Tensor:
    """All vectors turned inside each of two relation heads, of all heads joined."""
    width = tensor.shape[1] * tensor.shape[3] // 2
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    flat = tensor.transpose(1, 2).flatten(2).unflatten(2, (2, -1)) @ turn
    split: Tensor = flat.flatten(2).unflatten(2, (tensor.shape[1], -1))
    return split.transpose(1, 2)


def test_rotations_inside_a_relation_head_do_not_matter_and_permutations_do() -> None:
    bare = Bare()
    ours, theirs = bare.vectors
    plain = bare.value(ours, theirs)
    turned = {kind: rotated(tensor) for kind, tensor in ours.items()}
    assert torch.allclose(bare.value(turned, theirs), plain, rtol=1e-10)
    assert bare.value(turned, ours).abs() < 1e-9
    order = [2, 0, 1, 3]
    permuted = ours | {"query": ours["query"][:, order]}
    assert (bare.value(permuted, theirs) - plain).abs() > 1e-2


@pytest.mark.parametrize("poison", [math.nan, 1e4])
def test_pads_change_nothing(poison: float) -> None:
    """Values and gradients, bit by bit; no gradient at all at the pads."""
    bare = Bare()
    results = []
    for fill in (None, poison):
        sides = []
        for side in bare.vectors:
            pads = ~bare.real[:, None, :, None]
            changed = {k: v if fill is None else v.masked_fill(pads, fill) for k, v in side.items()}
            sides.append({k: v.clone().requires_grad_() for k, v in changed.items()})
        got = bare.value(*sides)
        got.backward()
        slopes = [tensor.grad for tensor in sides[0].values()]
        assert all(tensor.grad is None for tensor in sides[1].values())
        results.append((got.detach(), *slopes))
    for clean, dirty in zip(*results, strict=True):
        assert clean is not None
        assert dirty is not None
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()
    for slope in results[1][1:]:
        assert slope is not None
        assert not slope.transpose(1, 2)[~bare.real].any()
        assert slope.any()


def test_weights_of_the_kinds(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """A sum, as published."""
    parts = {}
    for kind in ("query", "key", "value"):
        term = replace(ALL, of=(kind,)).build(*specs(student, teacher))
        parts[kind] = value(term, student, teacher, batch(term.queries)).item()
    term = replace(ALL, of={"query": 2.0, "value": 0.5, "key": 0.0}).build(*specs(student, teacher))
    got = value(term, student, teacher, batch(term.queries)).item()
    assert got == pytest.approx(2 * parts["query"] + 0.5 * parts["value"], rel=1e-5)


def test_mixtures_of_blocks_and_weights_of_rows(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """One block of the teacher for certain is that block; weights are a weighted mean."""
    plain = {}
    for t in (2, 4):
        pairs = partial(layer_maps.explicit, pairs=[[2, t]])
        term = replace(ALL, layers=pairs).build(*specs(student, teacher))
        plain[t] = value(term, student, teacher, batch(term.queries)).item()
    rows = (Row(2, ((2, 1.0),), 3.0), Row(2, ((4, 1.0),), 1.0))
    term = replace(ALL, layers=LayerMap(rows, 2, 4, "test")).build(*specs(student, teacher))
    got = value(term, student, teacher, batch(term.queries)).item()
    assert got == pytest.approx((3 * plain[2] + plain[4]) / 4, rel=1e-5)
    mixed = LayerMap((Row(2, ((2, 0.5), (4, 0.5))),), 2, 4, "test")
    term = replace(ALL, layers=mixed).build(*specs(student, teacher))
    got = value(term, student, teacher, batch(term.queries)).item()
    # KL is convex in its first argument.
    assert 0 < got < (plain[2] + plain[4]) / 2


def test_no_rows_are_a_zero_with_a_graph(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    term = Relations().build(*specs(student, teacher))
    got = value(term, student, teacher, batch(term.queries, empty=(0, 1, 2, 3)))
    assert got.item() == 0.0
    got.backward()


def test_it_asks_for_whole_vectors_of_the_last_blocks(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    term = Relations().build(*specs(student, teacher))
    assert term.student == Request(relations=frozenset({2}))
    assert term.teacher == Request(relations=frozenset({4}))
    assert term.queries == QueryPlan(128, "supervised")
    assert term.notes[-1] == "relation heads: 2"


def test_relation_heads_nobody_named() -> None:
    """48 for a teacher of width 768 and 64 for one of 1,024, as published."""
    assert default_heads({"query": 768}, {"query": 768}) == 48
    assert default_heads({"query": 768}, {"query": 1024}) == 64
    assert default_heads({"query": 384, "key": 128}, {"query": 768, "key": 192}) == 8
    assert default_heads({"query": 15}, {"query": 8}) == 1
    spec = ModelSpec("m", "llama", 1, 32, 4, 16, kv_heads=2, head_dim=8, value_dim=6)
    assert widths(spec, ("query", "key", "value")) == {"query": 32, "key": 16, "value": 12}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": ()}, r"of is \(\); write some of query, key, value as a list"),
        ({"of": "query"}, "of is 'query'; write some of query, key, value as a list"),
        ({"of": ("query", "query")}, "each once"),
        ({"of": ("head",)}, r"of is \('head',\); write some of query, key, value"),
        ({"of": {"key": -1.0}}, r"of has weights \[-1.0\]; write finite numbers >= 0"),
        ({"of": {"key": 0.0}}, "one at least > 0"),
        ({"relation_heads": 0}, "relation_heads is 0; write a number >= 1, or leave it out"),
        ({"queries": 0}, "queries is 0; write a number >= 1, or null"),
        ({"rows": "all"}, "rows is 'all'; write one of supervised, valid"),
        ({"loss": lambda s, t: (s - t).sum()}, "returned shape"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Relations: .*{message}"):
        Relations(**changes)


def test_relation_heads_that_do_not_divide(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    message = (
        r"Relations: 12 relation heads do not divide the query width 32 of student \(4 heads of 8\)"
        "; write a divisor of all widths: 1, 2, 4, 8, 16"
    )
    with pytest.raises(ValueError, match=message):
        Relations(relation_heads=12).build(*specs(student, teacher))
    message = r"32 relation heads do not divide the key width 16 of student \(2 heads of 8\)"
    with pytest.raises(ValueError, match=message):
        Relations(relation_heads=32).build(*specs(student, teacher))
    assert Relations(relation_heads=32, of=("query",)).build(*specs(student, teacher))


def test_a_model_without_attention() -> None:
    spec = ModelSpec("x", "mamba", 2, 32, 0, 16)
    with pytest.raises(ValueError, match="no attention that can be read, and Relations asks for"):
        Relations().build(spec, spec)


def test_it_is_described() -> None:
    assert Relations().describe() == "map_kl, query + key + value, 128 supervised rows"
    other = Relations(loss=map_mse, of={"value": 2.0, "key": 1.0}, queries=None, rows="valid")
    assert other.describe() == "map_mse, 2 value + 1 key, all valid rows"


def test_it_is_bound_to_a_term(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    term = Relations(relation_heads=4).build(*specs(student, teacher))
    assert isinstance(term, RelationsTerm)
    assert term.heads == 4
    assert not list(term.parameters())
