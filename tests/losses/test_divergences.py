"""Divergences against naive float64 loops, closed forms, limits and hostile logits."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses.divergences import FLOOR, forward_kl, jsd, log_softmax, reverse_kl
from llm_distill.objectives import HeadTerm, Logits
from llm_distill.signals import ModelSpec
from tests import reference

Loss = Callable[[Tensor, Tensor], Tensor]
Naive = Callable[[reference.Array, reference.Array], reference.Array]

BETAS = (0.1, 0.5, 0.9)
PAIRS: dict[str, tuple[Loss, Naive]] = {
    "forward_kl": (forward_kl, reference.forward_kl),
    "reverse_kl": (reverse_kl, reference.reverse_kl),
    **{f"jsd({b})": (partial(jsd, beta=b), partial(reference.jsd, beta=b)) for b in BETAS},
}
LOSSES = {name: loss for name, (loss, _) in PAIRS.items()}

every_pair = pytest.mark.parametrize(("loss", "naive"), PAIRS.values(), ids=PAIRS.keys())
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def logits(
    rows: int = 5, vocabulary: int = 9, *, size: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = size * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


def slope(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]


@every_pair
def test_values_match_the_reference(loss: Loss, naive: Naive) -> None:
    student, teacher = logits()
    expected = torch.from_numpy(naive(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-13)


@every_pair
def test_gradients_match_the_reference(loss: Loss, naive: Naive) -> None:
    student, teacher = logits()
    expected = reference.gradient(lambda s: naive(s, teacher.numpy()), student.detach().numpy())
    torch.testing.assert_close(
        slope(loss, student, teacher), torch.from_numpy(expected), rtol=1e-8, atol=1e-10
    )


@every_loss
def test_gradcheck(loss: Loss) -> None:
    student, teacher = logits(rows=4, vocabulary=5)
    assert torch.autograd.gradcheck(loss, (student, teacher.requires_grad_()))


def test_the_gradient_of_forward_kl_is_q_minus_p() -> None:
    student, teacher = logits()
    expected = student.softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(slope(forward_kl, student, teacher), expected.detach())


@every_loss
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equal_models_read_zero_with_a_zero_gradient(
    loss: Loss, dtype: torch.dtype, most: float
) -> None:
    same = logits(vocabulary=1000)[1].to(dtype)
    assert loss(same, same).abs().max() <= most
    assert slope(loss, same, same).abs().max() <= most


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_equal_models_read_exactly_zero(loss: Loss) -> None:
    same = logits(vocabulary=1000)[1].float()
    assert loss(same, same).tolist() == [0.0] * len(same)


@every_loss
@pytest.mark.parametrize("apart", [1e-9, 1e-3, 1.0, 100.0])
def test_never_negative_beyond_rounding(loss: Loss, apart: float) -> None:
    student, teacher = logits(rows=200)
    near = teacher + apart * student.detach()
    assert loss(near, teacher).min() >= -1e-14
    assert loss(near.float(), teacher.float()).min() >= -1e-6


@every_loss
def test_a_shift_of_all_logits_changes_nothing(loss: Loss) -> None:
    student, teacher = logits()
    moved = student + torch.tensor([[-30.0], [0.0], [2.0], [7.0], [50.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(moved, teacher - 11), loss(student, teacher))
    torch.testing.assert_close(slope(loss, moved, teacher - 11), slope(loss, student, teacher))


@every_loss
def test_the_order_of_tokens_and_rows_does_not_matter(loss: Loss) -> None:
    student, teacher = logits()
    tokens, rows = torch.randperm(9), torch.randperm(5)
    torch.testing.assert_close(
        loss(student[rows][:, tokens], teacher[rows][:, tokens]), loss(student, teacher)[rows]
    )


def test_forward_and_reverse_are_each_other_swapped() -> None:
    student, teacher = logits()
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_swaps_with_its_beta(beta: float) -> None:
    student, teacher = logits()
    torch.testing.assert_close(
        jsd(student, teacher, beta=beta), jsd(teacher, student, beta=1 - beta)
    )


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_at_most_the_entropy_of_its_beta(beta: float) -> None:
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    disjoint = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert jsd(*disjoint, beta=beta).item() == pytest.approx(most, rel=1e-6)
    student, teacher = logits(rows=200, size=20)
    assert jsd(student, teacher, beta=beta).max() <= most + 1e-12


def test_closed_forms() -> None:
    even, tilted = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, math.log(3.0)]])
    tilted = tilted.double()
    assert forward_kl(tilted, even).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-8)
    assert forward_kl(tilted, even).item() == pytest.approx(0.143841, abs=1e-6)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert reverse_kl(tilted, even).item() == pytest.approx(reverse, abs=1e-8)
    middle = 0.5 * (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)) + 0.5 * (
        0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    )
    assert jsd(tilted, even).item() == pytest.approx(middle, abs=1e-8)


def test_jsd_over_beta_tends_to_forward_kl() -> None:
    student, teacher = logits(size=1.0)
    errors = [
        (jsd(student, teacher, beta=b) / b - forward_kl(student, teacher)).abs().max().item()
        for b in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > 50 * errors[1] > 50 * errors[2]
    assert errors[2] < 1e-4
    torch.testing.assert_close(
        slope(partial(jsd, beta=1e-6), student, teacher) / 1e-6,
        slope(forward_kl, student, teacher),
        atol=1e-4,
        rtol=1e-3,
    )


def test_jsd_over_one_minus_beta_tends_to_reverse_kl() -> None:
    student, teacher = logits(size=1.0)
    torch.testing.assert_close(
        jsd(student, teacher, beta=1 - 1e-6) / 1e-6,
        reverse_kl(student, teacher),
        atol=1e-4,
        rtol=1e-3,
    )


@pytest.mark.parametrize("beta", [-0.1, 0.0, 1.0, 1.5, math.nan])
def test_jsd_refuses_a_beta_outside(beta: float) -> None:
    with pytest.raises(ValueError, match=r"jsd: beta=.* is outside \(0, 1\).*forward_kl"):
        jsd(*logits(), beta=beta)


def logits_term(vocabulary: int, **settings: float | str) -> HeadTerm:
    spec = ModelSpec("tiny", "llama", 1, 8, 1, vocabulary)
    term = Logits(**settings).build(spec, spec)  # type: ignore[arg-type]  # fields by their names
    assert isinstance(term, HeadTerm)
    return term


def test_a_high_temperature_is_half_the_squared_distance_of_centred_logits() -> None:
    student, teacher = logits()
    term = logits_term(9, temperature=1000.0)
    difference = student - student.mean(-1, keepdim=True) - teacher
    expected = (difference + teacher.mean(-1, keepdim=True)).square().sum(-1) / (2 * 9)
    torch.testing.assert_close(
        term.values(student, teacher, torch.zeros(5)), expected, rtol=2e-2, atol=0.0
    )
    hotter = logits_term(9, temperature=1e5).values(student, teacher, torch.zeros(5))
    torch.testing.assert_close(hotter, expected, rtol=2e-4, atol=0.0)


def test_t_squared_keeps_the_size_of_the_gradient() -> None:
    student, teacher = logits(rows=50, size=1.0)

    def size(**settings: float | str) -> float:
        term = logits_term(9, **settings)
        gradient = slope(lambda s, t: term.values(s, t, torch.zeros(50)), student, teacher)
        return float(gradient.norm(dim=-1).mean())

    assert size(temperature=20.0) == pytest.approx(size(temperature=4.0), rel=0.15)
    ratio = size(temperature=20.0, scaling="none") / size(temperature=20.0)
    assert ratio == pytest.approx(1 / 400, rel=1e-9)
    assert size(temperature=20.0, scaling="T") == pytest.approx(size(temperature=20.0) / 20)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype)
    assert loss(student, teacher).isfinite().all()
    assert slope(loss, student, teacher).isfinite().all()
    assert loss(student, teacher)[1] == pytest.approx(0.0, abs=1e-6)


def test_extreme_logits_have_their_true_value() -> None:
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert forward_kl(student, teacher).item() == 2e4
    assert reverse_kl(student, teacher).item() == 2e4
    assert slope(forward_kl, student, teacher).tolist() == [[1.0, -1.0]]


@every_loss
def test_tokens_both_forbid_do_not_exist(loss: Loss) -> None:
    student, teacher = logits()
    barred = [torch.cat([z.detach(), torch.full((5, 2), -math.inf)], 1) for z in (student, teacher)]
    torch.testing.assert_close(loss(*barred), loss(student, teacher).detach())
    gradient = slope(loss, *barred)
    torch.testing.assert_close(gradient[:, :9], slope(loss, student, teacher))
    assert gradient[:, 9:].tolist() == [[0.0, 0.0]] * 5


@every_pair
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_tokens_one_forbids(loss: Loss, naive: Naive, who: str) -> None:
    student, teacher = (z.detach().clone() for z in logits())
    (student if who == "student" else teacher)[:, 3] = -math.inf
    expected = torch.from_numpy(naive(student.numpy(), teacher.numpy()))
    for dtype in (torch.float64, torch.float32):
        values = loss(student.to(dtype), teacher.to(dtype))
        assert values.isfinite().all()
        assert slope(loss, student.to(dtype), teacher.to(dtype)).isfinite().all()
        if expected.isfinite().all():
            torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert values.min() > 1e20


def test_only_the_infinite_divergences_explode() -> None:
    student, teacher = (z.detach().clone() for z in logits())
    student[:, 3] = -math.inf
    assert forward_kl(student, teacher).min() > 1e20
    assert reverse_kl(student, teacher).max() < 100
    assert forward_kl(teacher, student).max() < 100
    assert reverse_kl(teacher, student).min() > 1e20
    mass = teacher.softmax(-1)[:, 3]
    torch.testing.assert_close(forward_kl(student, teacher), -FLOOR * mass)


def test_a_row_that_forbids_everything_is_uniform() -> None:
    nothing = torch.full((1, 4), -math.inf)
    torch.testing.assert_close(log_softmax(nothing), torch.full((1, 4), -math.log(4.0)))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_what_the_inputs_lost(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = logits(rows=50, size=1.0)
    low = student.detach().to(dtype), teacher.to(dtype)
    values = loss(*low)
    assert values.dtype == torch.float32
    assert torch.equal(values, loss(low[0].float(), low[1].float()))
    torch.testing.assert_close(
        values.double(), loss(student, teacher).detach(), rtol=2e-2, atol=1e-2
    )
    gradient = slope(loss, *low)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(), slope(loss, student, teacher), rtol=2e-2, atol=5e-3
    )


@every_loss
def test_the_loss_stays_fp32_under_autocast(loss: Loss) -> None:
    student, teacher = (z.detach().float() for z in logits())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), loss(student, teacher))
        inside = loss(student, teacher)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(student, teacher))


@every_loss
def test_no_rows_are_empty_with_a_graph(loss: Loss) -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    values = loss(student, torch.zeros(0, 7))
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@every_loss
def test_one_token_leaves_nothing_to_say(loss: Loss) -> None:
    assert loss(torch.randn(3, 1), torch.randn(3, 1)).abs().max() <= 1e-7


@every_loss
@pytest.mark.parametrize("shape", [(5, 8), (4, 9)])
def test_other_shapes_are_refused(loss: Loss, shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match=r"size of tensor"):
        loss(torch.zeros(5, 9), torch.zeros(shape))
