"""The right answers are right, and the floor's GEMMs are those of the loss."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import dense, floors
from scripts.bench.inputs import LOSSES, Inputs, Loss
from scripts.bench.settings import HeadSettings

SMALL = HeadSettings(rows=11, vocab=40, student_width=8, teacher_width=16)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd:beta=0.3"])
def test_own_formulas_are_those_of_the_package(name: str) -> None:
    loss = Loss.parse(name)
    student, teacher = torch.randn(2, 5, 40, dtype=torch.float64)
    own = dense.values(loss, student, teacher, torch.zeros(5, dtype=torch.long))
    assert torch.allclose(own, loss.function(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_every_divergence_has_an_answer(name: str) -> None:
    answer = dense.answer(Inputs.draw(SMALL), Loss.parse(name), mixed=False, reference="float32")
    assert answer.loss > 0
    assert answer.gradients["head"].shape == (40, 8)


def test_float64_in_blocks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK", 4)
    inputs = Inputs.draw(SMALL)
    loss = Loss.parse("forward_kl")
    rough, exact = (
        dense.answer(inputs, loss, mixed=True, reference=reference)
        for reference in ("float32", "float64")
    )
    assert exact.gradients["hidden"].dtype == torch.float64
    assert rough.loss == pytest.approx(exact.loss, rel=1e-5)
    for name, gradient in exact.gradients.items():
        assert torch.allclose(rough.gradients[name].double(), gradient, atol=1e-6)


def test_two_lines_of_a_user_are_the_forward_kl() -> None:
    logits = torch.randn(2, 5, 40).unbind()
    expected = Loss.parse("forward_kl").function(*logits)
    assert torch.allclose(dense.naive_forward_kl(*logits), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [4, 11, 64])
def test_floor_runs_the_four_products(dtype: str, chunk: int) -> None:
    inputs = Inputs.draw(
        HeadSettings(rows=11, vocab=40, student_width=8, teacher_width=16, dtype=dtype)
    )
    buffers = floors.Buffers.make(inputs, chunk)
    with torch.no_grad():
        floors.run(inputs, buffers, chunk)
        z = inputs.student @ inputs.student_weight.T
        hidden, head = z @ inputs.student_weight, z.T @ inputs.student
    bound = 1e-5 if dtype == "float32" else 3e-2
    for found, expected in ((buffers.hidden, hidden), (buffers.head, head)):
        assert (found - expected).norm() <= bound * expected.norm()


def test_floor_keeps_its_outputs_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = floors.Buffers.make

    def counted(inputs: Inputs, chunk: int) -> floors.Buffers:
        made.append(chunk)
        return make(inputs, chunk)

    monkeypatch.setattr(floors.Buffers, "make", counted)
    inputs = Inputs.draw(SMALL)
    for reused, expected in ((True, 1), (False, 2)):
        made.clear()
        run = floors.gemms(inputs, 4, reused=reused)()
        run()
        run()
        assert len(made) == expected
