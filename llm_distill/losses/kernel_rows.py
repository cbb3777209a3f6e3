"""The Triton program of one row: statistics, value, gradient in the place of the logits.

Logits are read in their own dtype, everything is computed in fp32. A row is read three times: for
the maxima and sums of exponentials; for the value and sum(a), which the gradient of every token
needs; for the gradient. Where sum(a) is known before (forward KL) the last two are one.

What the interpreter does not show: a GPU's `maximum` drops NaN, so clamps are written with `where`;
the threads of a program are not in step, so the label's logit is read before the first reduction,
which is a barrier, and not when another thread may have written a gradient there; with -inf or NaN
in a lane the interpreter's numpy warns, a GPU does not.

This module needs Triton, so `kernels` imports it when it is used.
"""

import triton.language as tl

from llm_distill.losses.kernel_forms import Terms, jit

FLOOR = tl.constexpr(-1e30)
"""Stands for a logit of -inf: 0 * -1e30 is 0, but 0 * -inf is NaN."""

LOWEST = tl.constexpr(-3e38)
"""Where a running maximum starts: below every logit, and finite, as -inf minus -inf is NaN."""

INFINITE = tl.constexpr(1e8)
"""Nats per row from which a value counts as infinite."""


@jit
def program(  # noqa: PLR0913  a kernel has no objects
    z: tl.tensor,
    t: tl.tensor | None,
    labels: tl.tensor,
    values: tl.tensor,
    nll: tl.tensor | None,
    share: tl.tensor,
    nll_share: tl.tensor,
    mix: tl.tensor | None,
    z_stride: int,
    t_stride: int,
    share_stride: int,
    nll_stride: int,
    vocabulary: int,
    width: int,
    cold: float,
    z_scale: float,
    z_cap: float | None,
    t_scale: float,
    t_cap: float | None,
    first: float,
    second: float,
    factor: float,
    form: tl.constexpr,
    total: tl.constexpr,
    grad: tl.constexpr,
    own: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One row: its value and its negative log-likelihood; z becomes the gradient.

    What is None is left out when the program is compiled. `kernels.score` says what is given.
    """
    n = tl.program_id(0).to(tl.int64)  # a row's offset may exceed 2^31
    student = (z + n * z_stride, vocabulary, z_scale, z_cap)
    teacher, nll_weight = t, nll  # a tuple takes a None that was an argument, and no other
    if form is not None:
        teacher = (t + n * t_stride, width, t_scale, t_cap, mix)
    label = tl.load(labels + n)
    picked = _picked(student, label)
    norms, plain = _statistics(student, teacher, cold, own, block)
    doubt = tl.zeros([], tl.float32)
    if nll is not None:
        doubt = plain[1] - (picked - plain[0])
        tl.store(nll + n, doubt)
        nll_weight = tl.load(nll_share + n * nll_stride)
    row = (student, teacher, label, norms, plain)
    weight = tl.load(share + n * share_stride) * cold * factor
    settings = (first, second, cold, factor, weight, nll_weight)
    value = _scored(row, settings, doubt, form, total, grad, own, block) * factor
    tl.store(values + n, value)


@jit
def _picked(student: tl.tuple, label: tl.tensor) -> tl.tensor:
    """The label's logit; NaN for a label outside the vocabulary, which makes the row faulty."""
    known = (label >= 0) & (label < student[1])
    raw = tl.load(student[0] + label, mask=known, other=0.0).to(tl.float32)
    return tl.where(known, _finished(raw, student), float("nan"))


@jit
def _logits(head: tl.tuple, columns: tl.tensor) -> tl.tensor:
    """Finished logits of a block of tokens; anything finite beyond the head's last."""
    raw = tl.load(head[0] + columns, mask=columns < head[1], other=0.0).to(tl.float32)
    return _finished(raw, head)


@jit
def _finished(raw: tl.tensor, head: tl.tuple) -> tl.tensor:
    """Scale, soft cap, floor."""
    logits = raw * head[2]
    if head[3] is not None:
        # tanh from exp alone: the device library's is not to be had in the interpreter.
        fall = tl.exp(-2.0 * tl.abs(raw * (head[2] / head[3])))
        bound = head[3] * ((1.0 - fall) / (1.0 + fall))
        logits = tl.where(logits < 0.0, -bound, bound)
    return tl.where(logits < FLOOR, FLOOR, logits)


@jit
def _target(teacher: tl.tuple, student_logits: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """The teacher's logits, or where the target moves, those on the way to it."""
    logits = _logits(teacher, columns)
    if teacher[4] is not None:
        done = tl.load(teacher[4])
        logits = (1.0 - done) * student_logits + done * logits
    return logits


@jit
def _online(top: tl.tensor, total: tl.tensor, x: tl.tensor) -> "Terms":
    """Maximum and sum of exponentials, lane by lane, so without a barrier, and one exp for both."""
    fall = tl.exp(-tl.abs(x - top))
    rises = x > top
    return tl.where(rises, x, top), tl.where(rises, total * fall + 1.0, total + fall)


@jit
def _merged(top: tl.tensor, total: tl.tensor) -> "Terms":
    """Maximum of all lanes, and log of the sum of exponentials below it.

    They stay apart: added up they would lose the logarithm beside a maximum of 1e4.
    """
    highest = tl.max(top, axis=0)
    return highest, tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@jit
def _statistics(
    student: tl.tuple,
    teacher: tl.tuple,
    cold: float,
    own: tl.constexpr,
    block: tl.constexpr,
) -> "tuple[tl.tuple, tl.tuple]":
    """Both models' at the temperature, over the width; the student's own, over its vocabulary."""
    q_top = tl.full([block], LOWEST, tl.float32)
    p_top, own_top = q_top, q_top
    q_sum = tl.zeros([block], tl.float32)
    p_sum, own_sum = q_sum, q_sum
    end = student[1] if own else teacher[1]
    for start in range(0, end, block):
        columns = start + tl.arange(0, block)
        logits = _logits(student, columns)
        if teacher is not None:
            inside = columns < teacher[1]
            target = _target(teacher, logits, columns)
            q_top, q_sum = _online(q_top, q_sum, tl.where(inside, logits * cold, -float("inf")))
            p_top, p_sum = _online(p_top, p_sum, tl.where(inside, target * cold, -float("inf")))
        if own:
            masked = tl.where(columns < student[1], logits, -float("inf"))
            own_top, own_sum = _online(own_top, own_sum, masked)
    q, p = _merged(q_top, q_sum), _merged(p_top, p_sum)
    plain = _merged(own_top, own_sum) if own else q
    return (q[0], q[1], p[0], p[1]), plain


@jit
def _scored(  # noqa: PLR0913
    row: tl.tuple,
    settings: tl.tuple,
    doubt: tl.tensor,
    form: tl.constexpr,
    total: tl.constexpr,
    grad: tl.constexpr,
    own: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """The row's value without its factor, the gradient written on the way.

    Args:
        row: As in `_sweep`, like the others.
        settings: Likewise.
        doubt: Another value of the row, on which its gradient depends.
        form: The divergence; None: its value is 0.
        total: Sum(a), where it is known.
        grad: Whether the gradient is wanted.
        own: As in `_sweep`.
        block: As in `_sweep`.
    """
    value = tl.zeros([], tl.float32)
    if grad and (form is None or total is not None):
        value, _sum = _sweep(row, settings, (total, _sound(doubt)), form, own, block, back=True)
        if not _sound(value * settings[3]):
            _erase(row[0], block)
    elif form is not None:
        value, found = _sweep(row, settings, None, form, own, block, back=True)
        if grad:
            ok = _sound(value * settings[3]) & _sound(doubt)
            _sweep(row, settings, (found, ok), form, own, block, back=False)
    return value


@jit
def _sweep(
    row: tl.tuple,
    settings: tl.tuple,
    write: "tl.tuple | None",
    form: tl.constexpr,
    own: tl.constexpr,
    block: tl.constexpr,
    back: tl.constexpr,
) -> "Terms":
    """Go through a row once more: its value and sum(a), the gradient written if `write` is given.

    Args:
        row: Both models, the label and the statistics.
        settings: The form's two numbers, one over the temperature, the factor, both weights.
        write: Sum(a), and whether the row has a gradient.
        form: The divergence.
        own: Whether the student's own softmax is another than q.
        block: Tokens at a time.
        back: Backwards: the end of the row was read last and may still be in the cache.
    """
    student, teacher = row[0], row[1]
    value = tl.zeros([block], tl.float32)
    found = tl.zeros([block], tl.float32)
    blocks = tl.cdiv(student[1] if write is not None else teacher[1], block)
    for i in range(blocks):
        columns = (blocks - 1 - i if back else i) * block + tl.arange(0, block)
        logits = _logits(student, columns)
        slope = tl.zeros([block], tl.float32)
        q = slope
        if form is not None:
            inside = columns < teacher[1]
            log_q, log_p = _logs(row, logits, columns, settings[2])
            q = tl.exp(log_q)
            v, a = form(log_q, log_p, q, tl.exp(log_p), settings[0], settings[1])
            value += tl.where(inside, v, 0.0)
            found += tl.where(inside, a, 0.0)
            if write is not None:
                slope = tl.where(inside, settings[4] * (a - q * write[0]), 0.0)
        if write is not None:
            if settings[5] is not None:
                if own:
                    q = tl.exp((logits - row[4][0]) - row[4][1])
                slope += settings[5] * (q - tl.where(columns == row[2], 1.0, 0.0))
            _store(student, columns, logits, slope, write[1])
    return tl.sum(value, axis=0), tl.sum(found, axis=0)


@jit
def _logs(row: tl.tuple, logits: tl.tensor, columns: tl.tensor, cold: float) -> "Terms":
    """Log q and log p of a block of tokens."""
    norms = row[3]
    target = _target(row[1], logits, columns)
    return (logits * cold - norms[0]) - norms[1], (target * cold - norms[2]) - norms[3]


@jit
def _store(
    student: tl.tuple, columns: tl.tensor, logits: tl.tensor, slope: tl.tensor, ok: tl.tensor
) -> None:
    """The gradient of the product with the head, from that of the finished logits."""
    slope *= student[2]
    if student[3] is not None:
        bound = logits * (1.0 / student[3])
        slope *= 1.0 - bound * bound
    # Last, for a factor may be NaN. The dtype's own rounding is to the nearest.
    slope = tl.where(ok, slope, 0.0).to(student[0].dtype.element_ty)
    tl.store(student[0] + columns, slope, mask=columns < student[1])


@jit
def _sound(value: tl.tensor) -> tl.tensor:
    """Whether a value is a number and finite; NaN is not."""
    return tl.abs(value) < INFINITE


@jit
def _erase(student: tl.tuple, block: tl.constexpr) -> None:
    """Zeros for the whole row."""
    nothing = tl.zeros([block], student[0].dtype.element_ty)
    for start in range(0, student[1], block):
        columns = start + tl.arange(0, block)
        tl.store(student[0] + columns, nothing, mask=columns < student[1])
