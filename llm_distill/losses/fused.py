"""The head pass: all row-wise terms on logits in one chunked pass, gradients in the forward.

Logits of either model exist for one chunk of rows at a time: two products with the heads' weights,
values and gradient of all terms block by block in the place of the student's logits (`scoring`),
two products with that gradient. Nothing is computed twice, and the gradients of the hidden states
and of the head are all that is kept; therefore the weight of each term must be known before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_distill.losses.blending import Blend, Combined, Switch
from llm_distill.losses.closed import closed_form
from llm_distill.losses.gradients import Gradients, scaled
from llm_distill.losses.launching import launch, on_chip
from llm_distill.losses.pairs import Scratch
from llm_distill.losses.planning import headroom, plan
from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.scoring import Job, Side, Target, faulty, score
from llm_distill.losses.several import Sparse, each

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_distill.losses.rowwise import RowTerm

Teacher = Projection | Tensor | Combined | Sparse
"""Whole logits as a projection, `[N, V']` or of several teachers, or a sparse target."""

HALF = 2
"""Bytes of an fp16 or bf16 number."""

BLOCK = {"cpu": 3 << 17, "cuda": 1 << 24}
"""Logits of an elementwise block: in the cache of a core, or enough to fill a GPU."""


def head_pass(
    student: Projection,
    teacher: Teacher | None,
    labels: Tensor,
    terms: Sequence[RowTerm],
    shares: Tensor,
    *,
    measures: Sequence[RowTerm] = (),
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of row-wise terms, differentiable, and the value of each row, detached.

    Args:
        student: Its hidden states of the supervised rows, and its head.
        teacher: What it says of the same rows; None where no term listens.
        labels: `[N]`.
        terms: Functions of a block of rows.
        shares: `[K]`, factor on each term's sum.
        measures: M further ones whose values are wanted alone.
        chunk: Rows per matrix product; `rows_per_chunk` by default, which does not look at the
            memory that is free.

    Returns:
        `sum_k shares_k sum_n value_kn` as a scalar with gradients to the student's features, weight
        and bias, and `[K + M, N]` values. Both are fp32 (float64 for float64 features), whatever
        the autocast state; zero rows give zeros with a graph. Rows with a value that is no number
        or infinite (`scoring.faulty`) count nothing in sum and gradient.

    Raises:
        ValueError: If a term needs more than the teacher says, sizes do not belong together, or
            ids of a sparse target on the CPU are not in the student's vocabulary.
    """
    _check(student, teacher, labels, terms, shares)
    leaves: tuple[Tensor | None, ...] = student.features, student.weight, student.bias
    if not torch.is_grad_enabled():  # needs_input_grad would still be true, and the work be done
        leaves = tuple(None if leaf is None else leaf.detach() for leaf in leaves)
    device, dtype = student.features.device, working_dtype(student.features)
    if chunk is None:
        frozen = not (student.weight.requires_grad and torch.is_grad_enabled())
        chunk = rows_per_chunk(dtype, device.type, frozen=frozen)
    with torch.autocast(device.type, enabled=False):
        work = _Work(student.finish, teacher, labels, (*terms, *measures), chunk, dtype)
        return _untraced(*leaves, shares, work)


def _check(
    student: Projection,
    teacher: Teacher | None,
    labels: Tensor,
    terms: Sequence[RowTerm],
    shares: Tensor,
) -> None:
    """Refuse sizes that torch would broadcast or cut.

    Raises:
        ValueError: Naming them.
    """
    rows = len(student)
    if labels.shape != (rows,) or not (teacher is None or len(teacher) == rows):
        told = "none" if teacher is None else len(teacher)
        raise ValueError(
            f"{rows} rows of the student with labels {list(labels.shape)} and teacher rows: {told}"
        )
    if shares.shape != (len(terms),):
        raise ValueError(f"{len(terms)} terms with shares {list(shares.shape)}; write one for each")
    for part in each(teacher) if isinstance(teacher, Sparse) and rows else ():
        if part.ids.device.type != "cpu":  # on a GPU, to ask would be to wait for it
            continue
        highest = int(part.ids.max())
        if highest >= student.vocabulary:
            raise ValueError(
                f"the teacher tells of token {highest}, and the student has {student.vocabulary}; "
                "its targets are of another vocabulary, or of its padding: cut its logits to "
                f"[:, :{student.vocabulary}] before TopK.of or Counts.sample"
            )


def working_dtype(features: Tensor) -> torch.dtype:
    """Of the matrix products: that of the features, or of autocast; float64 stays what it is."""
    kind = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return features.dtype


def rows_per_chunk(
    dtype: torch.dtype,
    device: str,
    *,
    frozen: bool = False,
    vocabulary: int = 0,
    free: int | None = None,
) -> int:
    """Rows of one matrix product: as few as keep the products fast, fewer if memory is short.

    On a CPU smaller products stream the heads' weights too often; on a GPU the fp32 gradient of the
    head is read and written once per chunk, unless the head is frozen.

    Args:
        dtype: Of the matrix products.
        device: Its type.
        frozen: Whether the head gets no gradient.
        vocabulary: Columns of the logits.
        free: Bytes; the two chunks of logits take an eighth of them at most.
    """
    rows = {"cpu": 512 if dtype.itemsize == HALF else 256}.get(device, 512 if frozen else 2048)
    if free is not None and vocabulary:
        rows = min(rows, free // (8 * 2 * vocabulary * dtype.itemsize))
    return max(16, rows)


class _Work:
    """What a pass does besides its differentiable inputs."""

    def __init__(
        self,
        finish: Finish,
        teacher: Teacher | None,
        labels: Tensor,
        terms: tuple[RowTerm, ...],
        chunk: int,
        dtype: torch.dtype,
    ) -> None:
        self.finish, self.labels, self.terms, self.chunk = finish, labels, terms, chunk
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.teacher = teacher
        if isinstance(teacher, Projection | Blend | Switch):
            self.teacher = teacher.to(dtype)

    def job(self, student: Projection, shares: Tensor, *, wanted: bool) -> Job:
        """How a chunk is scored."""
        device = student.features.device
        block = BLOCK.get(device.type, BLOCK["cuda"])
        if isinstance(self.teacher, Sparse):  # one side is thin, and costs as much for few rows
            block *= 2
        widest = max(student.vocabulary, self.teacher_vocabulary)
        rows = min(self.chunk, max(2, block // max(1, widest)))
        teacher = Side()
        if isinstance(self.teacher, Projection):
            teacher = Side(self.teacher.finish, owned=True, finite=self.teacher.finite)
        found = plan(self.terms, student.vocabulary, self.teacher, self.teacher_vocabulary)
        return Job(
            plan=found,
            # Numbers are quicker than tensors, but to ask a GPU for them is to wait for it.
            shares=shares.tolist() if device.type == "cpu" else list(shares.unbind()),
            student=Side(self.finish, owned=True, finite=student.finite),
            teacher=teacher,
            wanted=wanted,
            scratch=Scratch(rows * widest, self.wide, device),
            rows=rows,
            forms={place: closed_form(term.loss) for place, term in found.coarse},
        )

    @property
    def teacher_vocabulary(self) -> int:
        """Columns of the teacher's logits; 0 where they are not whole."""
        if isinstance(self.teacher, Projection | Blend | Switch):
            return self.teacher.vocabulary
        return self.teacher.shape[1] if isinstance(self.teacher, Tensor) else 0

    def target(self, rows: slice, out: Tensor | None) -> Target:
        """What the teacher says of a chunk."""
        if isinstance(self.teacher, Projection) and out is not None:
            return self.teacher.product(rows, out)
        if isinstance(self.teacher, Blend | Switch):
            return self.teacher.chunk(rows)
        if isinstance(self.teacher, Sparse):
            return self.teacher.rows(rows)
        return self.teacher[rows] if isinstance(self.teacher, Tensor) else None


class _HeadPass(torch.autograd.Function):
    """Values and gradients chunk by chunk; the backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch gives its context no public type
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shares: Tensor,
        work: _Work,
    ) -> tuple[Tensor, Tensor]:
        """Run all chunks."""
        shares = shares.to(work.wide)
        # O(1) in halves: 1 / N would underflow in fp16, and a share of 1.003 be rounded to 1.
        half = work.dtype.itemsize == HALF
        ctx.scale = shares.abs().sum().clamp_min(1e-30) if half else None
        if work.dtype == torch.float16:
            ctx.scale = ctx.scale / headroom(work.terms[: len(shares)])
        own = Projection(features, weight, bias).to(work.dtype)
        needs = ctx.needs_input_grad[:3]
        grads = Gradients((features, weight, bias), needs, work.wide)
        relative = shares if ctx.scale is None else shares / ctx.scale
        job = work.job(own, relative, wanted=any(needs))
        counted = len(shares)
        chip = None
        if on_chip(features.device, work.dtype):
            chip = launch(job, relative, min(own.vocabulary, work.teacher_vocabulary))
        values = torch.zeros(len(work.terms), len(own), dtype=work.wide, device=features.device)
        most = min(work.chunk, len(own))
        z = own.features.new_empty(most, own.vocabulary)
        t = own.features.new_empty(most, work.teacher_vocabulary) if job.teacher.owned else None
        for start in range(0, len(own), work.chunk):
            rows = slice(start, min(start + work.chunk, len(own)))
            size = rows.stop - start
            target = work.target(rows, None if t is None else t[:size])
            slope = own.product(rows, z[:size])
            if chip is None:
                score(slope, target, work.labels[rows], values[:, rows], job)
            else:
                chip.score(slope, target, work.labels[rows], values[:, rows])
            if job.wanted:
                grads.add(rows, slope, own)
        ctx.grads = grads.finished()
        ctx.mark_non_differentiable(values)
        sums = values[:counted].masked_fill(faulty(values[:counted]), 0.0).sum(1)
        return (shares * sums).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Multiply what the forward computed."""
        if ctx.grads is None:
            raise RuntimeError(
                "the head pass has one backward: its gradients were made in the forward and are "
                "used up; run the forward again instead of retain_graph=True"
            )
        factor = grad if ctx.scale is None else grad * ctx.scale
        # Asking a GPU for the factor would wait for it.
        if factor.device.type == "cpu" and factor.item() == 1.0:
            grads = [None if g is None else g.to(dtype) for g, dtype in ctx.grads]
        else:
            # In fp32: a factor of 1 / N in the gradients' fp16 would be rounded or 0.
            grads = [None if g is None else scaled(g, factor, dtype) for g, dtype in ctx.grads]
        ctx.grads = None
        return (*grads, None, None)


# It writes into buffers inside its forward, which dynamo cannot trace: the graph breaks here.
_untraced: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.disable(_HeadPass.apply)
