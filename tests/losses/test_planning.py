"""Which terms share a softmax, which autograd does, and which a teacher cannot serve."""

import re
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from llm_distill.losses import alpha_beta, decoupled, forward_kl, jsd, reverse_kl
from llm_distill.losses.planning import Plan, plan
from llm_distill.losses.rowwise import Alone, Nll, RowTerm, Tempered
from llm_distill.losses.sparse import Counts, TopK

V = 9
WHOLE = torch.zeros(2, V)
TOP = TopK.of(torch.randn(2, V), 3)
DRAWN = Counts(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), draws=2)
MIX = torch.tensor(0.5)


def own(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """A row function of a user's."""
    del teacher, labels
    return student.sum(-1)


def shape(made: Plan) -> list[tuple[int, list[int], list[int]]]:
    """Of each group: width, places of its divergences, places of its labels."""
    return [(g.width, [m.place for m in g.members], list(g.labels)) for g in made.groups]


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([], []),
        ([Nll()], [(V, [], [0])]),
        ([Nll(), Nll()], [(V, [], [0, 1])]),
        ([Tempered(forward_kl), Tempered(jsd)], [(V, [0, 1], [])]),
        # None means the student's whole vocabulary, and there is no more than that.
        ([Tempered(forward_kl), Tempered(jsd, V), Tempered(jsd, V + 4)], [(V, [0, 1, 2], [])]),
        ([Tempered(), Tempered(width=5)], [(V, [0], []), (5, [1], [])]),
        ([Tempered(), Tempered(temperature=2.0)], [(V, [0], []), (V, [1], [])]),
        ([Tempered(temperature=2.0), Nll()], [(V, [0], []), (V, [], [1])]),
        ([Tempered(width=5), Nll()], [(5, [0], []), (V, [], [1])]),
        ([Nll(), Tempered(), Nll()], [(V, [1], [0, 2])]),
        # The plain softmax is looked for among all groups; factors keep nothing apart.
        (
            [Tempered(temperature=2.0), Nll(), Tempered(factor=3.0), Tempered(temperature=2.0)],
            [(V, [0, 3], []), (V, [2], [1])],
        ),
        ([Tempered(mix=MIX), Tempered(mix=MIX), Tempered()], [(V, [0, 1], []), (V, [2], [])]),
        ([Tempered(mix=MIX), Tempered(mix=MIX.clone())], [(V, [0], []), (V, [1], [])]),
        # A moving target moves the teacher alone.
        ([Tempered(mix=MIX), Nll()], [(V, [0], [1])]),
    ],
)
def test_terms_on_the_same_distributions_share_them(
    terms: Sequence[RowTerm], expected: list[tuple[int, list[int], list[int]]]
) -> None:
    made = plan(terms, V, WHOLE)
    assert shape(made) == expected
    assert made.free == made.coarse == ()
    for group in made.groups:
        assert all(member.term is terms[member.place] for member in group.members)


def test_what_has_no_closed_form_is_free() -> None:
    terms: list[RowTerm] = [
        own,
        Tempered(forward_kl),
        Alone(lambda s: s.sum(-1)),
        Tempered(decoupled),
        Tempered(partial(alpha_beta, beta=0.0)),
    ]
    made = plan(terms, V, WHOLE)
    assert made.free == tuple((k, terms[k]) for k in (0, 2, 3, 4))
    assert shape(made) == [(V, [1], [])]


@pytest.mark.parametrize("teacher", [TOP, DRAWN, None], ids=["top k", "counts", "none"])
def test_functions_of_the_student_need_no_teacher(teacher: object) -> None:
    alone = Alone(lambda s: s.sum(-1))
    made = plan([Nll(), alone], V, teacher)
    assert made.free == ((1, alone),)
    assert shape(made) == [(V, [], [0])]
    assert made.coarse == ()


def test_a_sparse_teacher_serves_divergences() -> None:
    first, other = Tempered(jsd, temperature=2.0, mix=MIX), Tempered(lambda s, t: s.sum(-1))
    terms: list[RowTerm] = [first, Nll(), other]
    made = plan(terms, V, TOP)
    assert made.coarse == ((0, first), (2, other))
    assert shape(made) == [(V, [], [1])]
    drawn = Tempered(forward_kl, 5, factor=2.0)
    assert plan([drawn], V, DRAWN).coarse == ((0, drawn),)


@pytest.mark.parametrize("teacher", [TOP, DRAWN], ids=["TopK", "Counts"])
def test_a_sparse_teacher_has_no_whole_logits(teacher: TopK | Counts) -> None:
    kind = type(teacher).__name__
    with pytest.raises(ValueError, match=rf"{kind} targets, and own reads its whole logits.*"):
        plan([Nll(), own], V, teacher)


@pytest.mark.parametrize(
    ("term", "told"),
    [
        (Tempered(reverse_kl), "reverse_kl"),
        (Tempered(partial(jsd, beta=0.1), temperature=2.0), "jsd(beta=0.1) at temperature 2"),
        (Tempered(mix=MIX), "forward_kl with a target that moves"),
    ],
)
def test_sampled_tokens_serve_forward_kl_alone(term: Tempered, told: str) -> None:
    message = f"forward_kl at temperature 1 alone, and the term is {told}; write Logits(loss=forw"
    with pytest.raises(ValueError, match=re.escape(message)):
        plan([term], V, DRAWN)


@pytest.mark.parametrize("loss", [forward_kl, decoupled], ids=["closed", "free"])
def test_a_divergence_needs_a_teacher(loss: object) -> None:
    with pytest.raises(ValueError, match="needs the teacher's logits, and there are none"):
        plan([Nll(), Tempered(loss)], V, None)  # type: ignore[arg-type]


def test_without_a_teacher_a_function_is_asked() -> None:
    """It may look at the student alone, which nobody can know."""
    assert plan([own], V, None).free == ((0, own),)
