"""Sparse teachers: a few tokens of each row instead of the whole vocabulary.

Two kinds. `TopK` keeps the likeliest tokens and merges all others into one, the tail; the student
is merged in the same way (`coarsen`), and what is left are two proper distributions, on which every
divergence works unchanged. Merging loses information, so an f-divergence (the KLs, `jsd`, the
skews, `tvd`, `todi`, `alpha_beta` with alpha + beta = 1) is a lower bound on the full one on every
row; `adaptive_kl`, `decoupled` and other `alpha_beta` are close and bound nothing. `Counts` keeps
tokens drawn from the teacher: noisy, but the gradient of `sampled_kl` is right on average. Tokens
that are known exactly may stand beside drawn ones (`Counts.beside`), which takes most of the noise.

K is the number of kept tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses.softmax import FLOOR, log_softmax, wide

__all__ = ["Counts", "TopK", "coarsen", "sampled_kl"]


def coarsen(logits: Tensor, ids: Tensor) -> Tensor:
    """All tokens but `ids` merged into one, the last: `[N, V], [N, K] -> [N, K + 1]`, log-space.

    The result is normalised, so these log-probabilities are logits again. The mass of the tail is
    summed over the tokens in it, not taken from 1, which would leave nothing of a thin tail. With
    K = V - 1 nothing is merged; with K = V the tail is empty, log-probability -1e30.

    Args:
        logits: Logits, -inf included.
        ids: Tokens to keep, each once in its row.

    Raises:
        ValueError: If there are more ids than tokens.

    Source: the log sum inequality makes it a bound for the KLs (Cover, Thomas 2006, Elements of
    Information Theory, section 2.7); f-divergences follow in the same way.

    >>> logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    >>> coarsen(logits, torch.tensor([[0, 2]])).exp()
    tensor([[0.4000, 0.2000, 0.4000]])
    """
    _check_width("coarsen", ids.shape[-1], logits.shape[-1])
    logits = wide(logits).clamp_min(FLOOR)
    # Below the floor: a forbidden token of the tail still weighs more than none.
    tail = logits.scatter(-1, ids, 2.0 * FLOOR).logsumexp(-1, keepdim=True)
    merged = torch.cat([logits.gather(-1, ids), tail], -1)
    return (merged - logits.logsumexp(-1, keepdim=True)).clamp_min(FLOOR)


@dataclass(frozen=True, eq=False)
class TopK:
    """The likeliest tokens of each row and the mass outside them.

    Attributes:
        ids: Kept tokens, `[N, K]` int64.
        log_probs: Their log-probabilities in the full distribution, `[N, K]`.
        tail: Log of the mass of all other tokens, `[N]`.

    Raises:
        ValueError: If the shapes do not belong together or ids are no int64.

    >>> top = TopK.of(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log(), 2)
    >>> top.ids, top.targets().exp()
    (tensor([[3, 2]]), tensor([[0.4000, 0.3000, 0.3000]]))
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        _check_ids("TopK", self.ids)
        if self.log_probs.shape != self.ids.shape or self.tail.shape != self.ids.shape[:1]:
            raise ValueError(
                f"TopK: ids {list(self.ids.shape)} with log_probs {list(self.log_probs.shape)} and "
                f"tail {list(self.tail.shape)}; they must be [N, K], [N, K] and [N]"
            )

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """The k likeliest tokens of each row of logits, in descending order, detached.

        Raises:
            ValueError: If k is less than 1 or more than the vocabulary.
        """
        _check_width("TopK", k, logits.shape[-1])
        logits = logits.detach()
        ids = logits.topk(k, -1).indices
        coarse = coarsen(logits, ids)
        return cls(ids, coarse[:, :-1], coarse[:, -1])

    def __len__(self) -> int:
        """Rows."""
        return len(self.ids)

    def targets(self) -> Tensor:
        """Log-probabilities of the kept tokens and the tail: `[N, K + 1]`, fp32 or better.

        They sum to 1, whatever the precision they were stored in: compare them with
        `coarsen(student, ids)`.
        """
        return log_softmax(torch.cat([self.log_probs, self.tail.unsqueeze(-1)], -1))

    def rows(self, part: slice) -> TopK:
        """Some of the rows; nothing is copied."""
        return TopK(self.ids[part], self.log_probs[part], self.tail[part])

    def first(self, k: int) -> TopK:
        """The first k tokens of each row; the others are of the tail."""
        if k >= self.ids.shape[1]:
            return self
        more = torch.cat([self.log_probs[:, k:], self.tail.unsqueeze(-1)], -1)
        return TopK(self.ids[:, :k], self.log_probs[:, :k], more.logsumexp(-1))

    def to(self, device: torch.device | str) -> TopK:
        """The same on a device."""
        return TopK(self.ids.to(device), self.log_probs.to(device), self.tail.to(device))


@dataclass(frozen=True, eq=False)
class Counts:
    """Tokens drawn from each row and how often: an unbiased picture of the distribution.

    Attributes:
        ids: Drawn tokens, `[N, K]` int64. Rows with fewer than K are filled up with one of their
            own tokens and count 0.
        counts: How often each was drawn, `[N, K]`; any weights >= 0 whose mean is the teacher's.
        draws: Draws per row, the sum of each row of `counts`.

    Raises:
        ValueError: If the shapes do not belong together, ids are no int64, or draws is less than 1.

    Source: Anshumann et al. 2025 (RS-KD), arXiv 2503.16870.
    """

    ids: Tensor
    counts: Tensor
    draws: int

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        _check_ids("Counts", self.ids)
        _check_draws(self.draws)
        if self.counts.shape != self.ids.shape:
            raise ValueError(
                f"Counts: ids {list(self.ids.shape)} with counts {list(self.counts.shape)}; both "
                "must be [N, K]"
            )

    @classmethod
    def sample(
        cls,
        logits: Tensor,
        draws: int,
        *,
        generator: torch.Generator | None = None,
        but: Tensor | None = None,
    ) -> Counts:
        """Draw tokens independently, with replacement, from the softmax of each row.

        K is the largest number of distinct tokens in a row, which the host has to be told.

        Args:
            logits: `[N, V]`.
            draws: Tokens to draw per row; 50 in the paper, about 12 of them distinct.
            generator: Of the logits' device.
            but: Tokens that are not drawn, `[N, M]`, fewer than there are: the others have the
                whole mass.

        Raises:
            ValueError: If draws is less than 1.
        """
        _check_draws(draws)
        # In float64: running sums in fp32 would lose tokens of less than 1e-7.
        logits = logits.detach().double().clamp_min(FLOOR)
        if but is not None:  # below forbidden tokens, of which one may be left alone
            logits = logits.scatter(-1, but, 2.0 * FLOOR)
        probabilities = logits.softmax(-1)
        drawn = probabilities.multinomial(draws, replacement=True, generator=generator)
        drawn = drawn.sort(-1).values
        slot = F.pad((drawn[:, 1:] != drawn[:, :-1]).cumsum(-1), (1, 0))
        width = int(slot[:, -1].max()) + 1 if len(slot) else 1
        ids = drawn[:, :1].repeat(1, width).scatter_(-1, slot, drawn)
        counts = torch.zeros_like(ids).scatter_add_(-1, slot, torch.ones_like(drawn))
        return cls(ids, counts, draws)

    def beside(self, top: TopK) -> Counts:
        """The same draws from the tail of `top`, its tokens exact: `[N, M], [N, K] -> [N, M + K]`.

        The mean of the weights is still the teacher's: p of the tokens of `top`, and for all others
        the tail's mass times their share of it.

        >>> drawn = Counts(torch.tensor([[2]]), torch.tensor([[5]]), draws=5)
        >>> top = TopK(torch.tensor([[0]]), torch.tensor([[0.9]]).log(), torch.tensor([0.1]).log())
        >>> drawn.beside(top).counts
        tensor([[0.9000, 0.1000]])
        """
        mass = top.targets().exp()
        rest = mass[:, -1:] * (self.counts / self.draws)
        return Counts(torch.cat([top.ids, self.ids], -1), torch.cat([mass[:, :-1], rest], -1), 1)

    def __len__(self) -> int:
        """Rows."""
        return len(self.ids)

    def rows(self, part: slice) -> Counts:
        """Some of the rows; nothing is copied."""
        return Counts(self.ids[part], self.counts[part], self.draws)

    def to(self, device: torch.device | str) -> Counts:
        """The same on a device."""
        return Counts(self.ids.to(device), self.counts.to(device), self.draws)


def sampled_kl(student: Tensor, teacher: Counts) -> Tensor:
    """KL(sampled teacher || student), unbiased in its gradient: `[N, V], [N, K] -> [N]`, nats.

    Formula: `sum_i t_i (log t_i - log q_i)` with t = counts / draws. The gradient q - t is on
    average q - p, that of `forward_kl`. The value is not: on average it is larger than the full
    KL by the entropy the sample lacks.

    Source: Anshumann et al. 2025 (RS-KD), arXiv 2503.16870.

    >>> drawn = Counts(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), draws=2)
    >>> sampled_kl(torch.tensor([[0.25, 0.75]]).log(), drawn)
    tensor([0.1438])
    """
    log_q = log_softmax(student).gather(-1, teacher.ids)
    share = teacher.counts.to(log_q.dtype) / teacher.draws
    return (torch.xlogy(share, share) - share * log_q).sum(-1)


def _check_width(owner: str, k: int, vocabulary: int) -> None:
    """Refuse to keep no token, or more than there are.

    Raises:
        ValueError: If k is less than 1 or more than the vocabulary.
    """
    if not 1 <= k <= vocabulary:
        raise ValueError(
            f"{owner}: {k} tokens to keep of a vocabulary of {vocabulary}; write a number from 1 "
            f"to {vocabulary}"
        )


def _check_ids(owner: str, ids: Tensor) -> None:
    """Refuse ids that are no `[N, K]` int64.

    Raises:
        ValueError: If they are not.
    """
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"{owner}: ids are {list(ids.shape)} of {ids.dtype}; they must be [N, K] of "
            "torch.int64: write ids.long()"
        )


def _check_draws(draws: int) -> None:
    """Refuse to draw nothing.

    Raises:
        ValueError: If draws is less than 1.
    """
    if draws < 1:
        raise ValueError(f"Counts: draws={draws}; write a number of tokens from 1 on, such as 50")
