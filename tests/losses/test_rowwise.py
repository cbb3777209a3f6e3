"""Row-wise terms as plain functions."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_distill.losses import decoupled, forward_kl, jsd
from llm_distill.losses.rowwise import Alone, Nll, Tempered, takes_labels
from tests.losses.catalogue import logits

LABELS = torch.tensor([0, 2, 4, 1, 3])


class TestNll:
    def test_it_is_minus_the_log_probability_of_the_label(self) -> None:
        student = logits()[0].detach()
        rows = zip(student.tolist(), LABELS.tolist(), strict=True)
        expected = [math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in rows]
        assert Nll()(student, None, LABELS).tolist() == pytest.approx(expected)

    def test_halves_are_computed_in_fp32(self) -> None:
        student = logits()[0].detach().to(torch.bfloat16)
        found = Nll()(student, None, LABELS)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, Nll()(student.float(), None, LABELS))

    def test_a_forbidden_label_shows_and_stays_finite(self) -> None:
        student = torch.tensor([[0.0, -math.inf]], requires_grad=True)
        value = Nll()(student, None, torch.tensor([1]))
        assert value.item() == pytest.approx(1e30)
        value.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_alone_sees_the_student_only() -> None:
    student = logits()[0].detach()
    assert torch.equal(Alone(lambda z: z.amax(-1))(student, None, LABELS), student.amax(-1))


class TestTempered:
    def test_both_are_cut_divided_and_multiplied(self) -> None:
        student, teacher = (z.detach() for z in logits())
        found = Tempered(jsd, 6, temperature=2.0, factor=4.0)(student, teacher[:, :7], LABELS)
        torch.testing.assert_close(found, 4 * jsd(student[:, :6] / 2, teacher[:, :6] / 2))

    def test_alone_it_is_the_forward_kl(self) -> None:
        student, teacher = (z.detach() for z in logits())
        assert torch.equal(Tempered()(student, teacher, LABELS), forward_kl(student, teacher))

    def test_losses_are_given_fp32(self) -> None:
        seen: list[torch.dtype] = []

        def spy(student: Tensor, teacher: Tensor) -> Tensor:
            seen.extend((student.dtype, teacher.dtype))
            return (student - teacher).sum(-1)

        student, teacher = (z.detach().to(torch.float16) for z in logits())
        Tempered(spy)(student, teacher, LABELS)
        assert seen == [torch.float32] * 2

    def test_a_loss_that_asks_for_the_labels_is_given_them(self) -> None:
        student, teacher = (z.detach() for z in logits())
        found = Tempered(partial(decoupled, beta=0.5))(student, teacher, LABELS)
        torch.testing.assert_close(found, decoupled(student, teacher, LABELS, beta=0.5))

    def test_without_a_teacher(self) -> None:
        with pytest.raises(ValueError, match="needs the teacher's logits, and there are none"):
            Tempered()(logits()[0], None, LABELS)

    @pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_a_moving_target(self, mix: float, temperature: float) -> None:
        """It is between the logits, before the temperature, and has no gradient."""
        student, teacher = logits()
        between = ((1 - mix) * student + mix * teacher).detach()
        term = Tempered(jsd, temperature=temperature, mix=torch.tensor(mix))
        found = term(student, teacher, LABELS)
        expected = jsd(student / temperature, between / temperature)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        slopes = [torch.autograd.grad(v.sum(), student)[0] for v in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)

    def test_between_a_forbidden_token_and_another_lies_a_number(self) -> None:
        student = torch.tensor([[0.0, -math.inf, -math.inf]])
        teacher = torch.tensor([[0.0, 1.0, -math.inf]])
        kept = student.clone(), teacher.clone()
        found = Tempered(mix=torch.tensor(0.5)).target(student, teacher)
        assert found.isfinite().all()
        assert found[0, 1:].tolist() == pytest.approx([-5e29, -1e30])
        assert torch.equal(student, kept[0])
        assert torch.equal(teacher, kept[1])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (forward_kl, False),
        (decoupled, True),
        (partial(decoupled, alpha=2.0), True),
        (lambda student, teacher, *, labels: F.cross_entropy(student, labels), True),
        (lambda student, teacher, **settings: student, False),
        (torch.dist, False),  # a builtin has no signature
    ],
    ids=["forward_kl", "decoupled", "partial", "keyword", "settings", "builtin"],
)
def test_takes_labels(loss: object, expected: bool) -> None:
    assert takes_labels(loss) is expected  # type: ignore[arg-type]
