"""The four kinds of targets: how each is made of a teacher's rows, and read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llm_distill.cache import columns
from llm_distill.cache.encoded import Encoded, Fidelity
from llm_distill.cache.estimator import (
    Estimator,
    Given,
    check_count,
    facts,
    fidelity,
    generator,
    half,
)
from llm_distill.cache.planes import most_bytes
from llm_distill.errors import InputError
from llm_distill.losses.softmax import log_softmax
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.signals import Factored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NO_TOP = TopK(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0))
"""Targets of no rows."""

NO_DRAWS = Counts(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), 1)
"""The same, drawn."""

FACTS = SHAPE = 4.0
"""Bytes of a row: two numbers of fp16 each, the facts, and the span and tail of a top."""

COUNT = 0.26
"""Bytes of a draw's count, compressed: most are 1."""


def of_top(count: int, vocabulary: int) -> float:
    """Bytes of a row's likeliest tokens, at most: ids, levels and shape."""
    # Two levels of each row are the first and the last, whatever its tokens.
    return most_bytes(count, vocabulary) + count - 0.8 + SHAPE


def of_drawn(count: int, vocabulary: int) -> float:
    """Bytes of a row's draws, at most: each of another token."""
    return most_bytes(count, vocabulary) + COUNT * count


@dataclass(frozen=True)
class Top(Estimator):
    """The k likeliest tokens and the mass of the others."""

    k: int
    name = "topk"
    columns = (*columns.TOP, "facts")

    def __str__(self) -> str:
        """In words."""
        return f"top {self.k} and the tail"

    def encode(self, given: Given) -> tuple[Encoded, Fidelity]:
        """The targets, and the KL of what is kept exactly to what is read back."""
        tops, told = [], []
        for rows in given.rows():
            logits = given.logits(rows)
            tops.append(TopK.of(logits, self.k))
            told.append(facts(logits, given.labels[rows]))
        top, known = columns.together(tops), torch.cat(told, 1)
        kept = Encoded(len(top), 0, {**columns.of_top(top), "facts": half(known)})
        return kept, fidelity(known, top, columns.top_of(kept, self.k))

    def tensors(self, found: Sequence[Encoded], dtype: torch.dtype) -> TopK:
        """The likeliest tokens."""
        del dtype
        parts = [columns.top_of(part, self.k) for part in found]
        return columns.together(parts) if parts else NO_TOP

    def row_bytes(self, vocabulary: int, width: int, itemsize: int) -> float:
        """Random ids, and levels and facts that no compressor makes smaller."""
        del width, itemsize
        return of_top(self.k, vocabulary) + FACTS

    def check(self, vocabulary: int) -> None:
        """Fewer than all."""
        check_count("topk: k", self.k, 1, min(vocabulary, 4096), "64")


@dataclass(frozen=True)
class Drawn(Estimator):
    """n tokens drawn from the teacher, with replacement: unbiased.

    Source: Anshumann et al. 2025 (RS-KD), arXiv 2503.16870.
    """

    n: int
    name = "sampled"
    columns = (*columns.DRAWN, "facts")

    def __str__(self) -> str:
        """In words."""
        return f"{self.n} draws"

    def encode(self, given: Given) -> tuple[Encoded, Fidelity]:
        """The draws, which are kept exactly."""
        dice = generator(given)
        drawn, told, mass = [], [], 0.0
        for rows in given.rows():
            logits = given.logits(rows)
            drawn.append(Counts.sample(logits, self.n, generator=dice))
            told.append(facts(logits, given.labels[rows]))
            seen = log_softmax(logits).exp().gather(-1, drawn[-1].ids)
            mass += float(seen.masked_fill(drawn[-1].counts == 0, 0.0).sum())
        all_drawn, known = columns.joined(drawn), torch.cat(told, 1)
        kept = Encoded(
            len(all_drawn),
            all_drawn.ids.shape[1],
            {**columns.of_drawn(all_drawn), "facts": half(known)},
        )
        return kept, fidelity(known, mass=mass)

    def tensors(self, found: Sequence[Encoded], dtype: torch.dtype) -> Counts:
        """The draws."""
        del dtype
        parts = [columns.drawn_of(part, self.n) for part in found]
        return columns.joined(parts) if parts else NO_DRAWS

    def row_bytes(self, vocabulary: int, width: int, itemsize: int) -> float:
        """Every draw of another token; a sharp teacher's take half of it, or less."""
        del width, itemsize
        return of_drawn(self.n, vocabulary) + FACTS

    def check(self, vocabulary: int) -> None:
        """As many as a byte counts."""
        del vocabulary
        check_count("sampled: n", self.n, 1, columns.MOST_DRAWS, "50")


@dataclass(frozen=True)
class Mixed(Estimator):
    """The m likeliest tokens, and n draws from the others: unbiased, and less noisy than draws."""

    m: int
    n: int
    name = "hybrid"
    columns = (*columns.TOP, *columns.DRAWN, "facts")

    def __str__(self) -> str:
        """In words."""
        return f"top {self.m} and {self.n} draws from the tail"

    def encode(self, given: Given) -> tuple[Encoded, Fidelity]:
        """Both, and the KL of the top and the tail."""
        dice = generator(given)
        tops, drawn, told = [], [], []
        for rows in given.rows():
            logits = given.logits(rows)
            tops.append(TopK.of(logits, self.m))
            drawn.append(Counts.sample(logits, self.n, generator=dice, but=tops[-1].ids))
            told.append(facts(logits, given.labels[rows]))
        top, rest = columns.together(tops), columns.joined(drawn)
        known = torch.cat(told, 1)
        found = {**columns.of_top(top), **columns.of_drawn(rest), "facts": half(known)}
        kept = Encoded(len(top), rest.ids.shape[1], found)
        return kept, fidelity(known, top, columns.top_of(kept, self.m))

    def tensors(self, found: Sequence[Encoded], dtype: torch.dtype) -> Counts:
        """Weights that are right on average."""
        del dtype
        if not found:
            return NO_DRAWS
        top = columns.together([columns.top_of(part, self.m) for part in found])
        return columns.joined([columns.drawn_of(part, self.n) for part in found]).beside(top)

    def row_bytes(self, vocabulary: int, width: int, itemsize: int) -> float:
        """Both."""
        del width, itemsize
        return of_top(self.m, vocabulary) + of_drawn(self.n, vocabulary) + FACTS

    def check(self, vocabulary: int) -> None:
        """Something has to be left to be drawn."""
        check_count("hybrid: m", self.m, 1, min(vocabulary - 1, 4096), "8")
        check_count("hybrid: n", self.n, 1, columns.MOST_DRAWS, "42")


@dataclass(frozen=True)
class States(Estimator):
    """The hidden states that the head takes: every divergence and temperature is exact."""

    name = "hidden"
    columns = ("states",)

    def __str__(self) -> str:
        """In words."""
        return "last hidden states"

    def encode(self, given: Given) -> tuple[Encoded, Fidelity]:
        """All of them.

        Raises:
            InputError: If the teacher gives logits alone.
            ValueError: If they are not finite.
        """
        said = given.said
        if not isinstance(said, Factored):
            raise InputError(
                "keep: hidden needs the teacher's hidden states and its head, and its head is "
                "offloaded; load it whole, or write keep: topk"
            )
        told = [facts(given.logits(rows), given.labels[rows]) for rows in given.rows()]
        features = said.head.features(said.hidden).to(said.head.weight.dtype)
        if not features.isfinite().all():
            raise ValueError("the last hidden states of the teacher are not finite")
        kept = Encoded(len(said), 0, {"states": columns.of_states(features)})
        back = self.tensors([kept], features.dtype).view(features.shape)
        if not back.equal(features.cpu()):
            raise RuntimeError("hidden states were not read back as they were written")
        return kept, fidelity(torch.cat(told, 1), mass=float(len(said)))

    def tensors(self, found: Sequence[Encoded], dtype: torch.dtype) -> Tensor:
        """Hidden states."""
        parts = [
            columns.states_of(part.columns["states"], part.rows, dtype)
            for part in found
            if part.rows  # of none nobody knows the width
        ]
        return torch.cat(parts) if parts else torch.zeros(0, 0, dtype=dtype)

    def example(self) -> None:
        """They serve any term on logits."""

    def row_bytes(self, vocabulary: int, width: int, itemsize: int) -> float:
        """All of them; a compressor finds little."""
        del vocabulary
        return float(width * itemsize)

    def check(self, vocabulary: int) -> None:
        """Any vocabulary will do."""
