"""Facts of tokens, read back, against a loop in float64 over the teacher's own logits."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_distill.cache.estimators import hidden, hybrid, sampled, topk
from llm_distill.cache.facts import read_facts
from llm_distill.errors import InputError
from tests import caches, tiny

HALF = 2.0**-11
"""Of a number: what is lost of it in two bytes, at most."""


def naive(row: dict[str, list[int]]) -> list[tuple[float, float]]:
    """Log-probability of the label and entropy of each supervised token, one at a time."""
    teacher = tiny.llama("teacher").double()
    with torch.no_grad():
        logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    found = []
    for place, label in enumerate(row["labels"][1:]):
        if label == -100:
            continue
        z = logits[place].tolist()
        total = math.fsum(math.exp(x - max(z)) for x in z)
        log_p = [x - max(z) - math.log(total) for x in z]
        found.append((log_p[label], -math.fsum(math.exp(x) * x for x in log_p)))
    return found


@pytest.mark.parametrize(
    "keep", [partial(topk, k=8), partial(sampled, n=5), partial(hybrid, m=2, n=3)]
)
@pytest.mark.parametrize(("split", "rows"), [("train", range(24)), ("eval", range(24, 32))])
def test_against_a_loop(tmp_path: Path, keep: Any, split: str, rows: range) -> None:
    path = caches.written(tmp_path, keep)
    wanted = [naive(row) for row in tiny.rows(32, empty=(3,)).select(rows)]
    found = list(read_facts(path, split))
    assert len({each.key for each in found}) == len(found)
    for each, exact in zip(found, filter(None, wanted), strict=True):
        labels, entropy = zip(*exact, strict=True)
        assert each.label_log_probs.tolist() == pytest.approx(labels, rel=HALF, abs=1e-4)
        assert each.entropy.tolist() == pytest.approx(entropy, rel=HALF, abs=1e-4)


def test_where_there_are_none(tmp_path: Path) -> None:
    path = caches.written(tmp_path, hidden, eval_dataset=None)
    with pytest.raises(InputError, match="keeps last hidden states, and the facts of tokens are"):
        read_facts(path)
    with pytest.raises(InputError, match=r"is not there .*llm-distill cache recipe"):
        read_facts(tmp_path / "nowhere")


def test_another_split(tmp_path: Path) -> None:
    path = caches.written(tmp_path)
    with pytest.raises(InputError, match="holds no test data; write one of train, eval"):
        read_facts(path, "test")
