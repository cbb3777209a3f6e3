"""Every loss between hidden states, with settings, beside its reference and what it ignores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses import (
    attention_transfer,
    cka,
    cosine,
    huber,
    info_nce,
    mse,
    nst,
    pkt,
    rkd_angle,
    rkd_distance,
)
from tests import reference, reference_features

Loss = Callable[[Tensor, Tensor], Tensor]
Naive = Callable[[reference.Array, reference.Array], reference.Array]


@dataclass(frozen=True)
class Case:
    """A loss and what is known of it.

    Attributes:
        loss: The function under test.
        naive: Its reference.
        ignores: Changes of the student alone that change nothing: `rotation` of its features,
            `scale` of all of it, `scale of rows`, `scale of neurons`, `shift` of all items, `order`
            and `signs` of its neurons.
        pulls: Whether equal models read 0, with a gradient of 0. A contrast does not.
        alone: Whether each row is for itself, so that rows are no group.
    """

    loss: Loss
    naive: Naive
    ignores: frozenset[str] = frozenset()
    pulls: bool = True
    alone: bool = False


def case(loss: Loss, naive: Naive, *ignores: str) -> Case:
    return Case(loss, naive, frozenset(ignores))


rigid = ("rotation", "order", "signs", "scale")
CASES: dict[str, Case] = {
    "mse": Case(mse, reference.mse, alone=True),
    "cosine": Case(cosine, reference.cosine, frozenset({"scale", "scale of rows"}), alone=True),
    "pkt": case(pkt, reference_features.pkt, *rigid, "shift"),
    "cka": case(cka, reference_features.cka, *rigid, "shift"),
    "nst(polynomial)": case(
        nst,
        partial(reference_features.nst, kernel="polynomial"),
        *("order", "signs", "scale", "scale of neurons"),
    ),
    "nst(linear)": case(
        partial(nst, kernel="linear"),
        partial(reference_features.nst, kernel="linear"),
        *("order", "scale", "scale of neurons"),
    ),
    "nst(gaussian)": case(
        partial(nst, kernel="gaussian"),
        partial(reference_features.nst, kernel="gaussian"),
        *("order", "scale", "scale of neurons"),
    ),
    "attention_transfer(2)": case(
        attention_transfer, reference_features.attention_transfer, *rigid
    ),
}
for _power in (1.0, 1.5, 4.0):
    CASES[f"attention_transfer({_power})"] = case(
        partial(attention_transfer, power=_power),
        partial(reference_features.attention_transfer, power=_power),
        *("order", "signs", "scale"),
    )
for _delta in (0.1, 1.0):
    CASES[f"huber({_delta})"] = Case(
        partial(huber, delta=_delta), partial(reference_features.huber, delta=_delta), alone=True
    )
    CASES[f"rkd_distance({_delta})"] = case(
        partial(rkd_distance, delta=_delta),
        partial(reference_features.rkd_distance, delta=_delta),
        *(*rigid, "shift"),
    )
    CASES[f"rkd_angle({_delta})"] = case(
        partial(rkd_angle, delta=_delta),
        partial(reference_features.rkd_angle, delta=_delta),
        *(*rigid, "shift"),
    )
for _temperature in (0.07, 1.0):
    CASES[f"info_nce({_temperature})"] = Case(
        partial(info_nce, temperature=_temperature),
        partial(reference_features.info_nce, temperature=_temperature),
        frozenset({"scale", "scale of rows"}),
        pulls=False,
    )

GROUPS = {name: case for name, case in CASES.items() if not case.alone}
RELATIONS = {name: case for name, case in GROUPS.items() if case.pulls}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_group = pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS.keys())
every_relation = pytest.mark.parametrize("case", RELATIONS.values(), ids=RELATIONS.keys())
every_pull = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.pulls],
    ids=[name for name, case in CASES.items() if case.pulls],
)


def states(rows: int = 6, width: int = 5, other: int | None = None) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's hidden states, of the same width unless told."""
    generator = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(rows, other or width, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), 0.7 + teacher


def slope(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Gradient of the sum over rows."""
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]


def changed(items: Tensor, change: str) -> Tensor:
    """Items after a change that some losses must not see."""
    rows, width = items.shape
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=items.dtype)

    made: dict[str, Callable[[], Tensor]] = {
        "rotation": lambda: items @ torch.linalg.qr(random(width, width))[0],
        "scale": lambda: 37.0 * items,
        "scale of rows": lambda: items * random(rows, 1).exp(),
        "scale of neurons": lambda: items * random(1, width).exp(),
        "shift": lambda: items + 10 * random(1, width),
        "order": lambda: items[:, torch.randperm(width, generator=generator)],
        "signs": lambda: items * random(1, width).sign(),
    }
    return made[change]()


CHANGES = ("rotation", "scale", "scale of rows", "scale of neurons", "shift", "order", "signs")
