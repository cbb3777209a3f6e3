"""What terms on maps share: counts, unbiased samples, and whatever layer map they are given."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llm_distill import AttentionMaps
from llm_distill import layers as layer_maps
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.layers import LayerMap, Row
from llm_distill.objectives import QueryPlan
from llm_distill.objectives.map_terms import check_rows, mixture, redraw_of, request
from llm_distill.objectives.relations import Relations
from llm_distill.rows import Batch
from llm_distill.signals import Request
from tests import tiny
from tests.objectives.compare import STEP, batch, read, specs

KINDS: dict[str, Any] = {
    "AttentionMaps": partial(AttentionMaps, layers=layer_maps.last),
    "Relations": Relations,
}


def drawn(plan: QueryPlan, epoch: int) -> Batch:
    """Four sequences of 6 to 24 tokens, with the queries of an epoch."""
    collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=True)
    data = tiny.rows(4)
    return make_batch(collate([data[k] for k in range(4)]), plan, seed=0, epoch=epoch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_stands_for_all_rows(
    kind: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """The mean over epochs is that over all rows, within 4 standard errors."""
    everything = KINDS[kind](rows="valid", queries=None).build(*specs(student, teacher))
    term = KINDS[kind](rows="valid", queries=3).build(*specs(student, teacher))
    found = []
    with torch.no_grad():
        assert everything.queries is not None
        whole = drawn(everything.queries, 0)
        said = [read(m, everything.student, whole) for m in (student,)]
        said.append(read(teacher, everything.teacher, whole))
        exact = (everything(*said, whole, STEP) / everything.count(whole)).item()
        assert term.queries is not None
        for epoch in range(60):
            given = drawn(term.queries, epoch)
            ours, theirs = read(student, term.student, given), read(teacher, term.teacher, given)
            found.append((term(ours, theirs, given, STEP) / term.count(given)).item())
            assert term.count(given) == everything.count(whole) == whole.rows("valid").index.numel()
    estimates = torch.tensor(found, dtype=torch.float64)
    error = estimates.std() / math.sqrt(len(found))
    assert 0 < error < 0.2 * exact
    assert abs(estimates.mean() - exact) < 4 * error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_longer_padding_changes_nothing(
    kind: str, side: Any, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """Seven more pads: the same value and gradients."""
    term = KINDS[kind](rows="valid", queries=5).build(*specs(student, teacher))
    data = tiny.rows(4)
    rows = [data[k] for k in range(4)]
    results = []
    for more in (1, 32):
        padding = Collator(pad_token_id=0, padding_side=side, pad_to_multiple_of=more)
        collated = RowCollator(padding, shift=True, valid=True)(rows)
        given = make_batch(collated, term.queries, seed=0, epoch=0)
        student.zero_grad()
        with torch.no_grad():
            theirs = read(teacher, term.teacher, given)
        got = term(read(student, term.student, given), theirs, given, STEP)
        got.backward()
        grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        results.append((got.detach(), grads))
    (value, slopes), (again, others) = results
    assert torch.allclose(value, again, rtol=1e-5)
    for a, b in zip(slopes, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_is_refused(
    kind: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    trained = LayerMap((Row(2, ((2, 0.5), (4, 0.5))),), 2, 4, "learned", trained=True)
    with pytest.raises(ValueError, match=f"{kind}: layers has shares that are trained .learned"):
        replace(KINDS[kind](), layers=trained).build(*specs(student, teacher))
    embedding = partial(layer_maps.explicit, pairs=[[0, 1]])
    with pytest.raises(ValueError, match=r"block 0 is out of range 1\.\.2"):
        replace(KINDS[kind](), layers=embedding).build(*specs(student, teacher))
    with pytest.raises(ValueError, match=f"{kind}: queries is 0; write a number >= 1, or null"):
        check_rows(kind, 0, "valid")
    with pytest.raises(ValueError, match=f"{kind}: rows is 'all'; write one of supervised, valid"):
        check_rows(kind, None, "all")


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_another_pair_of_models_is_refused(
    kind: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    other = layer_maps.uniform(3, 6)
    with pytest.raises(ValueError, match=r"this map .* is for a student of 3"):
        replace(KINDS[kind](), layers=other).build(*specs(student, teacher))


def test_requests_of_blocks() -> None:
    blocks = frozenset({2})
    assert request(blocks, whole=False) == Request(heads=blocks)
    assert request(blocks, whole=True) == Request(heads=blocks, relations=blocks)


def test_maps_that_are_drawn_anew() -> None:
    assert redraw_of(Relations()) is None
    assert redraw_of(Relations(layers=layer_maps.random)) is layer_maps.random
    assert redraw_of(Relations(layers=partial(layer_maps.random, epoch=1))) is None


def test_mixtures_are_by_shares() -> None:
    sides = [torch.eye(2), torch.ones(2, 2)]
    row = Row(1, ((1, 0.25), (2, 0.75)))
    assert torch.equal(mixture(row, sides), 0.25 * sides[0] + 0.75 * sides[1])
    assert mixture(Row(1, ((2, 1.0),)), sides[:1]) is sides[0]


def test_batches_without_queries_are_refused(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    term = Relations().build(*specs(student, teacher))
    with pytest.raises(LookupError, match="no sampled queries; a term on attention maps needs"):
        term.count(batch())
