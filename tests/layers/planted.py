"""Two models whose true map is known: a residual stream, and a student that reads some layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_distill.layers import Similarities, Similarity, keep

DEPTH, WIDTH, OF_STUDENT = 24, 192, 96
SETS, TOKENS = 4, 256


@dataclass(frozen=True)
class Planted:
    """What was measured of a planted pair."""

    similarity: Similarity
    cross: Similarity


def measure(
    truth: Sequence[int],
    seed: int,
    *,
    noise: float = 1.0,
    sinks: bool = False,
    cleaned: bool = True,
) -> Planted:
    """Similarities of a teacher of 24 layers and a student whose layer s is a noisy view of one.

    Args:
        truth: The teacher layer of each student layer.
        seed: Of the weights and the tokens.
        noise: Standard deviation beside states of about that of a residual stream.
        sinks: Every 64th token has the same massive activation in all layers of both models.
        cleaned: Whether `keep` drops them.
    """
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randn(DEPTH, WIDTH, WIDTH, generator=draw) / WIDTH**0.5
    views = torch.randn(len(truth) + 1, WIDTH, OF_STUDENT, generator=draw) / WIDTH**0.5
    gathered = Similarities()
    for _ in range(SETS):
        states = [torch.randn(TOKENS, WIDTH, generator=draw)]
        for block in blocks:
            states.append(states[-1] + torch.tanh(states[-1] @ block) * 0.7)
        own = [
            states[t] @ view + noise * torch.randn(TOKENS, OF_STUDENT, generator=draw)
            for t, view in zip([0, *truth], views, strict=True)
        ]
        if sinks:
            for layer in (*states[1:], *own[1:]):
                layer[::64] += 3000 * torch.randn(1, layer.shape[1], generator=draw)
        kept = keep([*states, *own]) if cleaned else torch.ones(TOKENS, dtype=torch.bool)
        gathered.add([x[kept] for x in states], [x[kept] for x in own])
    found = gathered.result()
    return Planted(found["similarity"], found["cross"])


def greedy(cross: Similarity) -> list[int]:
    """The most similar teacher block of each student block, in no order."""
    best: Tensor = cross.values[1:, 1:].argmax(1) + 1
    return [int(t) for t in best]


def error(found: Sequence[int], truth: Sequence[int]) -> float:
    """Mean distance in layers."""
    return sum(abs(a - b) for a, b in zip(found, truth, strict=True)) / len(truth)
