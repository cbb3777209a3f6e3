"""Two distributions of a few rows, in buffers that stay in the processor's cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Total(NamedTuple):
    """Log sum exp in two parts, as logits may be large where their differences are small.

    Attributes:
        top: The largest logit, `[n, 1]`.
        rest: What it lacks, `[n, 1]`, at least 0.
    """

    top: Tensor
    rest: Tensor

    def over(self, logits: Tensor) -> Tensor:
        """The total less some logits of the rows: `[n, k] -> [n, k]`."""
        return (self.top - logits).add_(self.rest)


class Scratch:
    """Work buffers of a block, made when they are first asked for and used again by the next block.

    Args:
        size: Numbers per buffer.
        dtype: Of all buffers.
        device: Of all buffers.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        """The buffer of one purpose: `[rows, width]`, holding whatever it held."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self._buffers[name][: rows * width].view(rows, width)


class Pair:
    """q = softmax(student) and p = softmax(teacher) of a block, and what follows from them.

    Closed forms read `q`, `p`, `gap`, `log_q` and `log_p` and leave them as they are; what
    `buffer`, `log_q_over` and `log_p_over` give is theirs. Everything is `[n, W]`.

    Args:
        student: Finite logits; overwritten.
        teacher: Finite logits; overwritten.
        scratch: Where buffers come from.
        sole: Whether one form alone reads this, which asks for the gap or for the logarithms.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, scratch: Scratch, *, sole: bool = False
    ) -> None:
        self._student, self._teacher, self._scratch = student, teacher, scratch
        self._sole = sole
        self._normalised = False
        self._student_total: Total | None = None
        self._gap: Tensor | None = None
        self.q = torch.softmax(student, -1, out=self.buffer("q"))
        self.p = torch.softmax(teacher, -1, out=self.buffer("p"))

    def buffer(self, name: str) -> Tensor:
        """A work buffer."""
        return self._scratch(name, *self._student.shape)

    @property
    def student_total(self) -> Total:
        """Log sum exp of the student's logits."""
        if self._student_total is None:
            self._student_total = log_total(self._student, self.q)
        return self._student_total

    @property
    def log_q(self) -> Tensor:
        """Log-probabilities of the student."""
        return self._logs()[0]

    @property
    def log_p(self) -> Tensor:
        """Log-probabilities of the teacher."""
        return self._logs()[1]

    @property
    def gap(self) -> Tensor:
        """Log p - log q."""
        if self._gap is None:
            out = self._teacher if self._sole else self.buffer("gap")
            shift = None
            if not self._normalised:
                theirs, own = log_total(self._teacher, self.p), self.student_total
                shift = (theirs.top - own.top) + (theirs.rest - own.rest)
            self._gap = torch.sub(self._teacher, self._student, out=out)
            if shift is not None:
                self._gap.sub_(shift)
        return self._gap

    def log_q_over(self, log_m: Tensor) -> Tensor:
        """Log q / m; log_q is used up where one form alone reads this."""
        return torch.sub(self.log_q, log_m, out=self.log_q if self._sole else self.buffer("a"))

    def log_p_over(self, log_m: Tensor) -> Tensor:
        """Log p / m; log_p is used up where one form alone reads this."""
        return torch.sub(self.log_p, log_m, out=self.log_p if self._sole else self.buffer("a"))

    def _logs(self) -> tuple[Tensor, Tensor]:
        """Both logits normalised in place, once."""
        if not self._normalised:
            own, theirs = self.student_total, log_total(self._teacher, self.p)
            self._student.sub_(own.top).sub_(own.rest)
            self._teacher.sub_(theirs.top).sub_(theirs.rest)
            self._normalised = True
        return self._student, self._teacher


def log_total(logits: Tensor, probabilities: Tensor) -> Total:
    """Log sum exp from the logits and their softmax, without another exp: `[n, V] x2 -> [n, 1]`.

    The largest probability is at least 1 / V, so its logarithm is well-conditioned.
    """
    rest = probabilities.amax(-1, keepdim=True).log_().neg_()
    return Total(logits.amax(-1, keepdim=True), rest)
