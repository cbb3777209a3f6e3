"""Several teachers in one head pass, against naive loops in float64 and against single teachers."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill.losses import divergences
from llm_distill.losses.blending import Blend, Confidence, Mode, Part, Switch, confident
from llm_distill.losses.fused import Teacher, head_pass
from llm_distill.losses.projection import Finish, Projection
from llm_distill.losses.rowwise import Nll, RowTerm, Tempered
from llm_distill.losses.several import Several, each
from llm_distill.losses.sparse import Counts, TopK

N, V = 13, 11
WEIGHTS = (0.5, 0.2, 0.3)
WIDE = torch.float64


def parts(*, seed: int = 0, dtype: torch.dtype = WIDE) -> tuple[Part, ...]:
    """Three teachers: a plain head, one with bias, cap and more padding, and ready-made logits."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return (
        Projection(draw(N, 4), 2 * draw(V, 4)),
        Projection(draw(N, 6), 3 * draw(V + 2, 6), draw(V + 2), Finish(0.5, 4.0)),
        2 * draw(N, V + 1),
    )


def dense(part: Part) -> Tensor:
    """Logits `[N, V]` of a simple part, cut to the common tokens."""
    if isinstance(part, Projection):
        product = part.features @ part.weight.T
        return part.finish(product if part.bias is None else product + part.bias)[:, :V]
    assert isinstance(part, Tensor)
    return part[:, :V]


def student(*, seed: int = 9, dtype: torch.dtype = WIDE, width: int = V) -> Projection:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(N, 5, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(width, 5, generator=g, dtype=torch.float64).to(dtype)
    return Projection(features.requires_grad_(), weight.requires_grad_())


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))


def gradients(
    own: Projection, teacher: Teacher | None, terms: list[RowTerm], shares: list[float], chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and the gradients of features and head."""
    share = torch.tensor(shares, dtype=torch.float64)
    loss, values = head_pass(own, teacher, labels(), terms, share, chunk=chunk)
    found = torch.autograd.grad(loss, (own.features, own.weight))
    return values, found[0], found[1]


def naive_logits(
    said: list[list[float]], shares: list[float], mode: Mode, temperature: float
) -> list[float]:
    """Combined logits of one row, number by number."""
    if mode == "logit_mean":
        return [sum(w * z[v] for w, z in zip(shares, said, strict=True)) for v in range(V)]
    mixed = [0.0] * V
    for w, z in zip(shares, said, strict=True):
        total = sum(math.exp(x / temperature) for x in z)
        mixed = [m + w * math.exp(x / temperature) / total for m, x in zip(mixed, z, strict=True)]
    return [temperature * math.log(m) for m in mixed]


def naive_shares(said: list[list[float]], label: int, by: Confidence | None) -> list[float]:
    """Shares of one row, number by number."""
    if by is None:
        return list(WEIGHTS)
    probabilities = []
    for z in said:
        total = sum(math.exp(x) for x in z)
        probabilities.append([math.exp(x) / total for x in z])
    if by == "entropy":
        trust = [math.exp(sum(p * math.log(p) for p in row)) for row in probabilities]
    else:
        inverse = [1 / row[label] for row in probabilities]  # exp of the cross-entropy
        trust = [(1 - x / sum(inverse)) / (len(inverse) - 1) for x in inverse]
    raw = [w * t for w, t in zip(WEIGHTS, trust, strict=True)]
    return [x / sum(raw) for x in raw]


@pytest.mark.parametrize("by", [None, "label", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mode", ["mixture", "logit_mean"])
def test_the_formula_number_by_number(
    mode: Mode, temperature: float, by: Confidence | None
) -> None:
    made = Blend(parts(), WEIGHTS, mode, by).chunk(slice(0, N))
    found = made.logits(V, temperature, labels())
    said = [dense(part).tolist() for part in parts()]
    for row, label in enumerate(labels().tolist()):
        own = [z[row] for z in said]
        expected = naive_logits(own, naive_shares(own, label, by), mode, temperature)
        torch.testing.assert_close(found[row].tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("width", [V, V - 3, V + 5])
def test_a_mixture_has_the_gradient_of_the_weighted_sum_of_kls(
    width: int, temperature: float, chunk: int
) -> None:
    """At any temperature, and for a student that has fewer tokens than the teachers, or more."""
    common = min(width, V)
    row = Tempered(divergences.forward_kl, common, temperature, temperature**2)
    keep = labels().clamp_max(common - 1)
    one, apart = student(width=width), student(width=width)
    share = torch.ones(1, dtype=torch.float64)
    loss, _ = head_pass(one, Blend(parts(), WEIGHTS), keep, [row], share, chunk=chunk)
    single: list[Any] = list(parts())
    each = [
        w * head_pass(apart, teacher, keep, [row], share, chunk=chunk)[0]
        for w, teacher in zip(WEIGHTS, single, strict=True)
    ]
    ours = torch.autograd.grad(loss, (one.features, one.weight))
    theirs = torch.autograd.grad(torch.stack(each).sum(), (apart.features, apart.weight))
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0.1
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    # The values differ: by what the teachers disagree about, which the student cannot change.
    assert float(loss.detach()) < float(torch.stack(each).sum().detach()) - 0.1


def test_a_mean_of_logits_has_another_gradient() -> None:
    row: list[RowTerm] = [Tempered(divergences.forward_kl, V)]
    found = [
        gradients(student(), Blend(parts(), WEIGHTS, mode), row, [1.0], 64)[1]
        for mode in ("mixture", "logit_mean")
    ]
    assert float((found[0] - found[1]).abs().max()) > 1e-2


def unsure(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """A row function of a user's own."""
    assert teacher is not None
    return (student.softmax(-1) - teacher.softmax(-1)).pow(2).sum(-1) + 0 * labels


TERMS: list[RowTerm] = [
    Nll(),
    Tempered(divergences.forward_kl, V),
    Tempered(partial(divergences.jsd, beta=0.3), V),
    Tempered(divergences.reverse_kl, V, temperature=2.0, factor=4.0),
    unsure,
    Tempered(
        divergences.forward_kl, V, temperature=1.5, mix=torch.tensor(0.4, dtype=torch.float64)
    ),
]
SHARES = [0.1, 2.0, 0.3, 0.7, 0.3, 0.2]


@pytest.mark.parametrize("by", [None, "label"])
@pytest.mark.parametrize("mode", ["mixture", "logit_mean"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_every_term_sees_it_at_its_own_temperature(
    chunk: int, mode: Mode, by: Confidence | None
) -> None:
    """All terms in one pass, against each one alone on logits that were combined before."""
    blend = Blend(parts(), WEIGHTS, mode, by)
    values, *grads = gradients(student(), blend, TERMS, SHARES, chunk)
    total: list[Tensor] = [torch.zeros_like(g) for g in grads]
    made = blend.chunk(slice(0, N))
    for k, (term, share) in enumerate(zip(TERMS, SHARES, strict=True)):
        cool = term.temperature if isinstance(term, Tempered) else 1.0
        alone = gradients(student(), made.logits(V, cool, labels()), [term], [share], N)
        torch.testing.assert_close(values[k], alone[0][0], rtol=1e-10, atol=1e-12)
        total = [a + b for a, b in zip(total, alone[1:], strict=True)]
    torch.testing.assert_close(grads, total, rtol=1e-10, atol=1e-12)


PLACES = ((0, 3, 4, 12), (1, 2, 11), (5, 6, 7, 8, 9, 10))


def switch(dtype: torch.dtype = WIDE) -> tuple[Switch, Tensor]:
    """Each row from one of three teachers, and the same as logits."""
    whole = torch.empty(N, V, dtype=dtype)
    own: list[Part] = []
    for part, places in zip(parts(dtype=dtype), PLACES, strict=True):
        index = torch.tensor(places)
        whole[index] = dense(part)[index]
        if isinstance(part, Projection):
            own.append(Projection(part.features[index], part.weight, part.bias, part.finish))
        else:
            assert isinstance(part, Tensor)
            own.append(part[index])
    return Switch(tuple(own), PLACES), whole


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_switch_gives_each_row_its_teacher(chunk: int) -> None:
    given, whole = switch()
    assert (len(given), given.vocabulary) == (N, V)
    values, *grads = gradients(student(), given, TERMS, SHARES, chunk)
    expected, *wanted = gradients(student(), whole, TERMS, SHARES, 64)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-12)


def test_a_teacher_without_rows_in_a_switch() -> None:
    first = parts()[0]
    assert isinstance(first, Projection)
    nothing = Projection(first.features[:0], first.weight)
    given = Switch((nothing, first), ((), tuple(range(N))))
    values = gradients(student(), given, TERMS, SHARES, 4)[0]
    torch.testing.assert_close(values, gradients(student(), first, TERMS, SHARES, 4)[0])


def test_they_nest_and_keep_the_temperature() -> None:
    """A blend of blends is the blend of all; a switch may hold one, and a blend a switch."""
    a, b, c = parts()
    flat = Blend((a, b, c), (0.25, 0.25, 0.5)).chunk(slice(0, N))
    deep = Blend((Blend((a, b), (0.5, 0.5)), c), (0.5, 0.5)).chunk(slice(0, N))
    inside = Switch((deep,), (tuple(range(N)),))
    for temperature in (1.0, 3.0):
        expected = flat.logits(V, temperature, labels())
        torch.testing.assert_close(deep.logits(V, temperature, labels()), expected)
        torch.testing.assert_close(inside.logits(V, temperature, labels()), expected)
    given, whole = switch()
    both = Blend((given, whole), (0.5, 0.5)).chunk(slice(2, 9))
    expected = whole[2:9].log_softmax(-1)
    torch.testing.assert_close(both.logits(V, 1.0, labels()[2:9]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_halves_are_combined_in_fp32(dtype: torch.dtype) -> None:
    """No worse than the products: what is added to them is not rounded again."""
    own = student(dtype=dtype)
    blend = Blend(parts(dtype=dtype), WEIGHTS)
    _, values = head_pass(own, blend, labels(), [Tempered(width=V)], torch.ones(1))
    wide, exact = student(), Blend(parts(), WEIGHTS)
    _, expected = head_pass(wide, exact, labels(), [Tempered(width=V)], torch.ones(1, dtype=WIDE))
    assert values.dtype == torch.float32
    bound = {torch.bfloat16: 0.1, torch.float16: 2e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(values.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("mode", ["mixture", "logit_mean"])
def test_what_one_teacher_forbids(mode: Mode) -> None:
    """A mixture allows what any teacher allows, a mean of logits what all do; no NaN in either."""
    first, second = torch.zeros(1, 3), torch.zeros(1, 3)
    first[0, 2] = second[0, 1] = -torch.inf
    blend = Blend((first, second), (0.5, 0.5), mode)
    p = blend.logits(3, 1.0, torch.tensor([0])).softmax(-1)[0]
    expected = [0.5, 0.25, 0.25] if mode == "mixture" else [1.0, 0.0, 0.0]
    torch.testing.assert_close(p.tolist(), expected)


def test_a_teacher_that_forbids_the_label_is_not_heard() -> None:
    z = torch.tensor([[0.0, 0.0, -torch.inf]])
    shares = confident([z, torch.zeros(1, 3)], (0.5, 0.5), torch.tensor([2]), "label")
    assert shares.flatten().tolist() == [0.0, 1.0]


def test_a_teacher_of_weight_0_is_not_heard() -> None:
    z, other = torch.randn(4, 3), 30 * torch.randn(4, 3)
    where = torch.zeros(4, dtype=torch.long)
    for by in (None, "label", "entropy"):
        told = Blend((z, other), (1.0, 0.0), confidence=by).logits(3, 1.0, where)
        torch.testing.assert_close(told, z.log_softmax(-1))


def test_no_rows() -> None:
    own = Projection(torch.zeros(0, 5, requires_grad=True), torch.ones(V, 5, requires_grad=True))
    first = Projection(torch.zeros(0, 4), torch.ones(V, 4))
    none = torch.zeros(0, dtype=torch.long)
    for teacher in (Blend((first, first), (0.5, 0.5)), Switch((first, first), ((), ()))):
        loss, _ = head_pass(own, teacher, none, [Tempered(width=V)], torch.ones(1))
        loss.backward()
        assert float(loss.detach()) == 0.0


class TestSparse:
    """Teachers that tell a few tokens of each row, each its own."""

    def targets(self) -> list[TopK | Counts]:
        whole = [dense(part) for part in parts()]
        drawn = Counts.sample(whole[2], 7, generator=torch.Generator().manual_seed(0))
        return [TopK.of(whole[0], 3), TopK.of(whole[1], 5), drawn]

    @pytest.mark.parametrize("chunk", [4, 64])
    def test_it_is_the_weighted_sum_of_the_members(self, chunk: int) -> None:
        terms: list[RowTerm] = [Tempered(width=V), Nll()]
        given = Several.of(self.targets(), WEIGHTS)
        values, *grads = gradients(student(), given, terms, [2.0, 0.0], chunk)
        apart = [gradients(student(), each, terms, [2.0, 0.0], chunk) for each in self.targets()]
        for place, found in enumerate((values[0], *grads)):
            own = [each[place][0] if place == 0 else each[place] for each in apart]
            expected = sum(w * each for w, each in zip(WEIGHTS, own, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def test_everything_that_is_kept_is_the_mixture(self) -> None:
        """With all tokens kept but one the gradient is that of the blend."""
        row: list[RowTerm] = [Tempered(width=V, temperature=2.0)]
        kept = [TopK.of(dense(part), V - 1) for part in parts()]
        few = gradients(student(), Several.of(kept, WEIGHTS), row, [1.0], 64)
        whole = gradients(student(), Blend(parts(), WEIGHTS), row, [1.0], 64)
        torch.testing.assert_close(few[1:], whole[1:], rtol=1e-10, atol=1e-12)

    def test_they_nest(self) -> None:
        a, b, c = self.targets()
        nested = Several.of([Several.of([a, b], (0.5, 0.5)), c], (0.4, 0.6))
        assert nested.parts == (a, b, c)
        assert nested.weights == (0.2, 0.2, 0.6)
        assert each(nested) == nested.parts
        assert len(nested.rows(slice(2, 5))) == 3

    def test_tokens_that_the_student_lacks_are_found_in_any_of_them(self) -> None:
        given = Several.of(self.targets(), WEIGHTS)
        with pytest.raises(ValueError, match="and the student has 6"):
            gradients(student(width=6), given, [Tempered(width=6)], [1.0], 64)

    def test_drawn_tokens_serve_forward_kl_alone(self) -> None:
        given = Several.of(self.targets(), WEIGHTS)
        with pytest.raises(ValueError, match="unbiased for forward_kl at temperature 1"):
            gradients(student(), given, [Tempered(width=V, temperature=2.0)], [1.0], 64)
