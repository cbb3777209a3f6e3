"""Every divergence by the name a recipe gives it, through the head pass, against the naive loops.

At a temperature, in chunks smaller than the rows, on vocabularies of two sizes, on heads with scale
and soft cap, on logits that vary: where published losses were wrong, one of these hid it.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from llm_distill.losses.fused import head_pass
from llm_distill.losses.projection import Finish, Projection
from llm_distill.objectives import HeadTerm, Objective
from llm_distill.recipe.components import Components
from llm_distill.recipe.values import Place
from llm_distill.signals import ModelSpec
from tests import reference

N, STUDENT, TEACHER, WIDTH, T = 11, 13, 15, 6, 2.0
LABELS = torch.arange(N) % STUDENT

Naive = Callable[[reference.Array, reference.Array], reference.Array]

NAMED: dict[str, Naive] = {
    "forward_kl": reference.forward_kl,
    "reverse_kl": reference.reverse_kl,
    "jsd": lambda s, t: reference.jsd(s, t, 0.5),
    "{jsd: {beta: 0.1}}": lambda s, t: reference.jsd(s, t, 0.1),
    "{jsd: {beta: 0.1, normalize_ends: true}}": lambda s, t: reference.jsd(s, t, 0.1) / 0.09,
    "skew_forward_kl": lambda s, t: reference.skew_forward_kl(s, t, 0.1),
    "{skew_forward_kl: {alpha: 0.3}}": lambda s, t: reference.skew_forward_kl(s, t, 0.3),
    "skew_reverse_kl": lambda s, t: reference.skew_reverse_kl(s, t, 0.1),
    "{skew_reverse_kl: {alpha: 3e-1}}": lambda s, t: reference.skew_reverse_kl(s, t, 0.3),
    "tvd": reference.tvd,
    "adaptive_kl": lambda s, t: reference.adaptive_kl(s, t, 0.5),
    "{adaptive_kl: {mu: 0.8}}": lambda s, t: reference.adaptive_kl(s, t, 0.8),
    "alpha_beta": lambda s, t: reference.alpha_beta(s, t, 0.2, 0.7),
    "{alpha_beta: {alpha: 0.5, beta: 0.5}}": lambda s, t: reference.alpha_beta(s, t, 0.5, 0.5),
    "todi": reference.todi,
    "decoupled": lambda s, t: reference.decoupled(s, t, LABELS.tolist(), 1.0, 1.0),
}


def models() -> tuple[Projection, Projection]:
    """Heads whose logits vary, the student's padded less, with scale, soft cap and bias."""
    generator = torch.Generator().manual_seed(5)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = Projection(
        tensor(N, WIDTH), tensor(STUDENT, WIDTH), tensor(STUDENT), Finish(0.7, 4.0)
    )
    return student, Projection(tensor(N, WIDTH + 1), tensor(TEACHER, WIDTH + 1), None, Finish(1.3))


def logits(model: Projection) -> reference.Array:
    """By NumPy."""
    z = model.features.numpy() @ model.weight.numpy().T
    z = model.finish.scale * (z if model.bias is None else z + model.bias.numpy())
    cap = model.finish.softcap
    return cast("reference.Array", z if cap is None else cap * np.tanh(z / cap))


def term(text: str) -> HeadTerm:
    """As a recipe says it."""
    given = yaml.safe_load(f"Logits: {{loss: {text}, temperature: {T}}}")
    built: Any = Components(())(given, Objective, Place("objectives").entry(1))
    specs = (ModelSpec("tiny", "llama", 1, 8, 1, size) for size in (STUDENT, TEACHER))
    found: HeadTerm = built.build(*specs)
    return found


@pytest.mark.parametrize("text", NAMED)
def test_values_and_gradients(text: str) -> None:
    student, teacher = models()
    z, t = logits(student), logits(teacher)[:, :STUDENT]
    expected = T**2 * NAMED[text](z / T, t / T)
    assert expected.min() > 1e-3
    weight = student.weight.clone().requires_grad_()
    own = Projection(student.features, weight, student.bias, student.finish)
    shares = torch.ones(1, dtype=torch.float64)
    loss, values = head_pass(own, teacher, LABELS, [term(text).row], shares, chunk=3)
    np.testing.assert_allclose(values[0].numpy(), expected, rtol=1e-10)
    assert float(loss.detach()) == pytest.approx(expected.sum(), rel=1e-10)
    if text.startswith(("adaptive_kl", "{adaptive_kl", "todi")):
        return  # weights held constant: their gradient has references of its own
    loss.backward()

    def moved(entry: reference.Array) -> reference.Array:
        """Values where one weight of the head is another."""
        changed = student.weight.numpy().copy()
        changed[4, 2] = entry[0]
        head = Projection(student.features, torch.from_numpy(changed), student.bias, student.finish)
        return T**2 * NAMED[text](logits(head) / T, t / T)

    slope = reference.gradient(moved, np.array([float(student.weight[4, 2])]))
    assert weight.grad is not None
    assert abs(slope[0]) > 1e-4
    assert float(weight.grad[4, 2]) == pytest.approx(slope[0], rel=1e-7)


def test_every_public_divergence_is_here() -> None:
    from llm_distill import losses

    features = {"attention_transfer", "cka", "cosine", "huber", "info_nce", "map_kl", "map_mse"}
    features |= {"mse", "nst", "pkt", "rkd_angle", "rkd_distance"}
    assert {name for name in losses.__all__ if name not in features} == {
        text.strip("{").partition(":")[0] for text in NAMED
    }
