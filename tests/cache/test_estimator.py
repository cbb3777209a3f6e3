"""What every kind of target shares: chunks, what is measured, settings that are refused."""

import math
import re

import pytest
import torch

from llm_distill.cache.estimator import (
    CHUNK,
    Given,
    check_count,
    facts,
    fidelity,
    generator,
    half,
)
from llm_distill.errors import InputError
from llm_distill.losses.sparse import TopK
from llm_distill.signals import Dense

LOGITS = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 3, 10, 2, 2])


def test_rows_in_chunks_cover_everything_once() -> None:
    rows = 2 * CHUNK + 3
    given = Given(Dense(torch.zeros(rows, 4)), torch.zeros(rows, dtype=torch.long), 3, 0)
    places = [place for part in given.rows() for place in range(rows)[part]]
    assert places == list(range(rows))
    assert given.logits(given.rows()[-1]).shape == (3, 3)


def test_label_and_entropy_against_a_loop() -> None:
    label, entropy = facts(LOGITS, LABELS)
    for row in range(5):
        p = [float(x) for x in LOGITS[row].exp() / LOGITS[row].exp().sum()]
        assert label[row].exp() == pytest.approx(p[int(LABELS[row])])
        assert entropy[row] == pytest.approx(-sum(x * torch.tensor(x).log() for x in p))


def test_a_label_that_only_the_teacher_has() -> None:
    label, _ = facts(LOGITS[:, :10], LABELS)
    assert label[2] == -torch.inf
    assert label[[0, 1, 3, 4]].isfinite().all()


def test_facts_are_kept_in_two_bytes_each() -> None:
    assert half(facts(LOGITS, LABELS)).size == 2 * 2 * 5


def test_what_was_lost_is_a_divergence_of_sorted_rows() -> None:
    top = TopK.of(LOGITS, 3)
    order = top.ids.argsort(-1)
    same = TopK(top.ids.gather(-1, order), top.log_probs.gather(-1, order), top.tail)
    told = facts(LOGITS, LABELS)
    found = fidelity(told, top, same)
    assert found.kl == pytest.approx(0.0, abs=1e-12)
    assert found.mass == pytest.approx(float(top.log_probs.exp().sum()))
    assert found.nll == pytest.approx(-float(told[0].sum()))
    worse = TopK(same.ids, same.log_probs - 0.1, same.tail)
    by_hand = 0.0
    for row in range(5):
        p = [*same.log_probs[row].exp().tolist(), float(same.tail[row].exp())]
        q = [*worse.log_probs[row].exp().tolist(), float(same.tail[row].exp())]
        by_hand += sum(x * math.log(x * sum(q) / y) for x, y in zip(p, q, strict=True))
    assert fidelity(told, top, worse).kl == pytest.approx(by_hand)
    assert fidelity(told, top, worse).worst >= by_hand / 5


def test_draws_follow_from_the_seed_alone() -> None:
    one, two = (
        torch.rand(3, generator=generator(Given(Dense(LOGITS), LABELS, 11, seed)))
        for seed in (5, 6)
    )
    again = torch.rand(3, generator=generator(Given(Dense(LOGITS[:2]), LABELS[:2], 11, 5)))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("row", "fine"),
    [([0.0, -torch.inf], True), ([0.0, torch.nan], False), ([0.0, torch.inf], False)],
)
def test_what_is_no_distribution(row: list[float], fine: bool) -> None:
    given = Given(Dense(torch.tensor([[1.0, 2.0], row])), torch.tensor([0, 0]), 2, 0)
    if fine:
        assert given.logits(slice(0, 2)).shape == (2, 2)
        return
    with pytest.raises(ValueError, match="the logits of the teacher are not finite"):
        given.logits(slice(0, 2))


@pytest.mark.parametrize("count", [0, -1, 9, True, 1.5, "4", None, math.nan])
def test_numbers_out_of_their_range(count: object) -> None:
    message = f"keep: topk: k is {count!r}; write a number from 1 to 8, such as 4"
    with pytest.raises(InputError, match=re.escape(message)):
        check_count("topk: k", count, 1, 8, "4")
