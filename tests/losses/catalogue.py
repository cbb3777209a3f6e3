"""Every divergence of two blocks of logits, with settings, beside its float64 reference."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    todi,
    tvd,
)
from tests import reference

Loss = Callable[[Tensor, Tensor], Tensor]
Naive = Callable[[reference.Array, reference.Array], reference.Array]

BETAS = (0.1, 0.5, 0.9)
ALPHAS = (0.1, 0.5, 0.9)
MASSES = (0.2, 0.5, 0.95)
EXPONENTS = (
    (0.2, 0.7),
    (1.0, 0.0),
    (0.0, 1.0),
    (0.5, 0.5),
    (1.0, 1.0),
    (0.6, 0.0),
    (0.0, 0.4),
    (0.5, -0.5),
    (-0.3, 0.3),
    (0.3, -0.1),
    (0.0, 0.0),
)


@dataclass(frozen=True)
class Case:
    """A divergence and what is known of it.

    Attributes:
        loss: The function under test.
        naive: Its reference.
        holds: Whether its gradient leaves weights out that depend on the student; then `naive`
            takes the student of those weights as `held`.
        merges: Whether merging tokens never raises it.
    """

    loss: Loss
    naive: Callable[..., reference.Array]
    holds: bool = False
    merges: bool = True

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The reference's gradient."""
        at, other = student.detach().numpy(), teacher.numpy()
        settings = {"held": at} if self.holds else {}
        return torch.from_numpy(
            reference.gradient(lambda moved: self.naive(moved, other, **settings), at)
        )


def normalized(student: reference.Array, teacher: reference.Array, beta: float) -> reference.Array:
    return reference.jsd(student, teacher, beta) / (beta * (1 - beta))


CASES: dict[str, Case] = {
    "forward_kl": Case(forward_kl, reference.forward_kl),
    "reverse_kl": Case(reverse_kl, reference.reverse_kl),
    "tvd": Case(tvd, reference.tvd),
    "todi": Case(todi, reference.todi, holds=True),
}
for _b in BETAS:
    CASES[f"jsd({_b})"] = Case(partial(jsd, beta=_b), partial(reference.jsd, beta=_b))
    CASES[f"jsd({_b}, normalize_ends)"] = Case(
        partial(jsd, beta=_b, normalize_ends=True), partial(normalized, beta=_b)
    )
for _a in ALPHAS:
    CASES[f"skew_forward_kl({_a})"] = Case(
        partial(skew_forward_kl, alpha=_a), partial(reference.skew_forward_kl, alpha=_a)
    )
    CASES[f"skew_reverse_kl({_a})"] = Case(
        partial(skew_reverse_kl, alpha=_a), partial(reference.skew_reverse_kl, alpha=_a)
    )
for _m in MASSES:
    CASES[f"adaptive_kl({_m})"] = Case(
        partial(adaptive_kl, mu=_m), partial(reference.adaptive_kl, mu=_m), holds=True, merges=False
    )
for _a, _b in EXPONENTS:
    CASES[f"alpha_beta({_a}, {_b})"] = Case(
        partial(alpha_beta, alpha=_a, beta=_b),
        partial(reference.alpha_beta, alpha=_a, beta=_b),
        merges=_a + _b == 1,
    )

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_loss = pytest.mark.parametrize(
    "loss", [case.loss for case in CASES.values()], ids=CASES.keys()
)


def logits(
    rows: int = 5, vocabulary: int = 9, *, size: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = size * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


def slope(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]
