"""The Triton path: values and gradient of one chunk of rows in a single launch.

It takes a divergence, negative log-likelihood, or both; where it applies (`usable`, `supports`) it
computes what `scoring` does, in fp32, from logits in fp32, bf16 or fp16. Triton itself is imported
by the first launch: without it everything else works.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_distill.losses import divergences, reweighted
from llm_distill.losses.projection import Finish

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_TOKENS = 2048
"""Tokens of a row at a time.

With 8 warps that is 8 per thread: 16 bytes of bf16, the widest load there is. A row of 152k tokens
takes 75 steps, the last of which is a fifth full: 1 % idle. Compiled for an H200 the forms take 48
to 110 registers, so that two to five programs share a multiprocessor; with 16 warps it would be one
or two. Reasoned, not measured.
"""

TOKENS_PER_WARP = 256
"""Eight for each thread of a warp, also where a vocabulary is smaller."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of logits."""


@dataclass(frozen=True)
class Form:
    """A divergence as the device knows it.

    Attributes:
        name: Key of `kernel_forms.FORMS`.
        first: Its first number.
        second: Its second number.
        factor: On value and gradient.
        total: Sum(a) where every row has the same; None: it is summed.
    """

    name: str
    first: float = 0.0
    second: float = 0.0
    factor: float = 1.0
    total: float | None = None


FORWARD_KL = Form("forward_kl", total=-1.0)
"""Its a = -p sums to -1, which saves a pass over the row."""


@dataclass(frozen=True, eq=False)
class Spec:
    """What is computed of every chunk; numbers that may change from step to step are on the device.

    Attributes:
        form: The divergence; None: negative log-likelihood alone.
        width: Tokens both vocabularies have; both are cut to them and renormalised.
        temperature: Both models' logits are divided by it.
        student: What follows the student's product.
        teacher: What follows the teacher's.
        share: Factor on the divergence's gradient, fp32: `[]` or `[n]`.
        nll_share: Factor on the gradient of the negative log-likelihood, likewise; None: there is
            none.
        mix: A number in [0, 1], fp32 `[]`: the teacher's logits become
            `(1 - mix) * student + mix * teacher`, the student's without a gradient. None: 1.
        grad: Whether the gradient is wanted.
    """

    form: Form | None
    share: Tensor
    width: int = 0
    temperature: float = 1.0
    student: Finish = field(default_factory=Finish)
    teacher: Finish = field(default_factory=Finish)
    nll_share: Tensor | None = None
    mix: Tensor | None = None
    grad: bool = True


def usable(device: torch.device) -> bool:
    """Whether Triton runs here: on a GPU, or interpreted where that was asked for."""
    asked = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return asked and importlib.util.find_spec("triton") is not None


def supports(loss: Callable[..., Any]) -> Form | None:
    """The form of a divergence with its settings, plain or in a `partial`; None: there is none.

    >>> supports(partial(divergences.jsd, beta=0.1)).first
    0.1
    """
    function, given = (loss.func, loss.keywords) if isinstance(loss, partial) else (loss, {})
    if (
        not isinstance(function, Hashable)
        or function not in _FORMS
        or (isinstance(loss, partial) and loss.args)
    ):
        return None
    settings = {
        name: given.get(name, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return _FORMS[function](**settings)


def score(z: Tensor, t: Tensor | None, labels: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Values of a chunk, and its gradient in the place of its logits.

    No number is read on the host.

    Args:
        z: `[n, V]`, the student's product with its head; where a gradient is wanted, overwritten by
            the one of `sum(share * value) + sum(nll_share * nll)`. Rows of which a value is no
            number, or over 1e8, get 0.
        t: `[n, V']`, the teacher's; None without a divergence.
        labels: `[n]`, int64. One outside [0, V) makes its nll NaN.
        spec: Everything else.

    Returns:
        Values of the divergence (0 without one) and the negative log-likelihoods of the labels over
        the student's whole vocabulary (None without `nll_share`), `[n]`, fp32, nats.

    Raises:
        ValueError: If logits are of another dtype, or not contiguous along the row; if the width
            exceeds a vocabulary.
    """
    _check(z, t, spec)
    values = torch.empty(len(z), dtype=torch.float32, device=z.device)
    nll = None if spec.nll_share is None else torch.empty_like(values)
    if len(z):
        with torch.cuda.device_of(z):  # a launch goes to the current device
            _launch(z, t, labels, values, nll, spec)
    return values, nll


def _launch(
    z: Tensor, t: Tensor | None, labels: Tensor, values: Tensor, nll: Tensor | None, spec: Spec
) -> None:
    """Start one program per row."""
    from llm_distill.losses.kernel_forms import FORMS
    from llm_distill.losses.kernel_rows import program

    form = spec.form or Form("")
    vocabulary = z.shape[1]
    # A softmax of its own for the labels, unless q is that already.
    alike = spec.form is not None and spec.temperature == 1.0 and spec.width == vocabulary
    nll_share = spec.share if spec.nll_share is None else spec.nll_share
    block = min(MOST_TOKENS, 1 << max(vocabulary - 1, 31).bit_length())
    program[(len(z),)](
        z,
        t,
        labels,
        values,
        nll,
        spec.share,
        nll_share,
        spec.mix,
        z.stride(0),
        0 if t is None else t.stride(0),
        spec.share.stride(0) if spec.share.dim() else 0,
        nll_share.stride(0) if nll_share.dim() else 0,
        vocabulary,
        spec.width or vocabulary,
        1.0 / spec.temperature,
        spec.student.scale,
        spec.student.softcap,
        spec.teacher.scale,
        spec.teacher.softcap,
        form.first,
        form.second,
        form.factor,
        form=None if spec.form is None else FORMS[form.name],
        total=form.total,
        grad=spec.grad,
        own=spec.form is None or (nll is not None and not alike),
        block=block,
        num_warps=max(1, block // TOKENS_PER_WARP),
    )


def _check(z: Tensor, t: Tensor | None, spec: Spec) -> None:
    """Refuse what the program would misread.

    Raises:
        ValueError: Naming what is wrong.
    """
    if (spec.form is None) != (t is None):
        raise ValueError("a divergence and the teacher's logits are given together or not at all")
    for name, logits in (("student", z), ("teacher", t)):
        if logits is None:
            continue
        if logits.dtype not in DTYPES:
            raise ValueError(
                f"the Triton path computes in fp32 and takes logits in {DTYPES}; the {name}'s are "
                f"in {logits.dtype}: float64 has the PyTorch path"
            )
        if logits.dim() != 2 or logits.stride(1) != 1:
            raise ValueError(
                f"the {name}'s logits must be [n, V] with each row contiguous; they are "
                f"{list(logits.shape)} with strides {logits.stride()}: call .contiguous()"
            )
        if spec.form is not None and not 0 < spec.width <= logits.shape[1]:
            raise ValueError(
                f"width={spec.width} is not among the {logits.shape[1]} tokens of the {name}; "
                "it is at most the smaller vocabulary"
            )


def _jsd(*, beta: float, normalize_ends: bool) -> Form:
    """Ends included where they are allowed."""
    if normalize_ends and beta in (0.0, 1.0):
        return Form("reverse_kl") if beta else FORWARD_KL
    return Form("jsd", beta, factor=1.0 / (beta * (1.0 - beta)) if normalize_ends else 1.0)


def _alpha_beta(*, alpha: float, beta: float) -> Form:
    """The case of the formula that divides by the larger exponent."""
    if max(abs(alpha), abs(beta)) < torch.finfo(torch.float32).eps ** 0.5:
        return Form("square")
    return Form("alpha_beta" if abs(alpha) >= abs(beta) else "beta_alpha", alpha, beta)


_FORMS: dict[Callable[..., Tensor], Callable[..., Form]] = {
    divergences.forward_kl: lambda: FORWARD_KL,
    divergences.reverse_kl: lambda: Form("reverse_kl"),
    divergences.jsd: _jsd,
    divergences.skew_forward_kl: lambda *, alpha: Form("skew_forward_kl", alpha),
    divergences.skew_reverse_kl: lambda *, alpha: Form("skew_reverse_kl", alpha),
    divergences.tvd: lambda: Form("tvd"),
    reweighted.alpha_beta: _alpha_beta,
    reweighted.todi: lambda: Form("todi"),
}
