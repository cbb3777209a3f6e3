"""What losses need, looked up through settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import pytest
from torch import Tensor

from llm_distill import losses
from llm_distill.losses import attention_transfer, cka, huber, mse, nst, pkt, rkd_angle
from llm_distill.losses.needs import Needs, needs


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (mse, Needs()),
        (huber, Needs()),
        (pkt, Needs(3, 512, "token", same_width=False, normalize="none")),
        (rkd_angle, Needs(3, 64, "token", same_width=False, normalize="none")),
        (cka, Needs(4, 1024, "token", same_width=False, normalize="none")),
        (nst, Needs(2, 256, "sequence", same_width=False, normalize="none")),
        (attention_transfer, Needs(2, None, "sequence", same_width=False, normalize="none")),
    ],
)
def test_the_table(loss: Callable[..., Tensor], expected: Needs) -> None:
    assert needs(loss) == expected


def test_settings_change_nothing() -> None:
    assert needs(partial(partial(nst, kernel="linear"), neurons=3)) == needs(nst)


def test_functions_of_ones_own_are_for_each_row() -> None:
    assert needs(lambda student, teacher: (student - teacher).square().mean(-1)) == Needs()


def test_callables_without_a_hash_may_be_asked_for() -> None:
    @dataclass
    class Scaled:
        by: float

        def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
            return self.by * mse(student, teacher)

    assert needs(Scaled(2.0)) == Needs()


def test_relations_need_no_projector_and_no_normalisation() -> None:
    found = {name: needs(vars(losses)[name]) for name in losses.__all__}
    wide = {name for name, need in found.items() if not need.same_width}
    assert wide == {"attention_transfer", "cka", "nst", "pkt", "rkd_angle", "rkd_distance"}
    assert {found[name].normalize for name in wide} == {"none"}
    assert all(need.most is None or need.least <= need.most for need in chain(found.values()))
