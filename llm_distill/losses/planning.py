"""Which terms of a head pass share a softmax, which have a closed form, which autograd must do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_distill.losses.closed import Form, closed_form
from llm_distill.losses.described import describe_function
from llm_distill.losses.divergences import forward_kl
from llm_distill.losses.rowwise import Alone, Nll, RowTerm, Tempered
from llm_distill.losses.several import Sparse, each
from llm_distill.losses.sparse import Counts

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADROOM = 64.0
"""fp16 slopes are made this much larger: of a flat softmax on 128k tokens they are below 1e-5,
which fp16 knows to 1 % only. Its largest number, 65504, leaves room for steep ones."""


@dataclass(frozen=True)
class Member:
    """A divergence in closed form, and its place among the terms."""

    place: int
    term: Tempered
    form: Form


@dataclass(frozen=True)
class Group:
    """Terms on the same two distributions: the first tokens of both vocabularies, tempered alike.

    Attributes:
        width: Tokens.
        members: The divergences; none where only the labels ask for the student's softmax.
        labels: Places of the terms on the labels.
    """

    width: int
    members: tuple[Member, ...] = ()
    labels: tuple[int, ...] = ()

    def takes(self, term: Tempered, width: int) -> bool:
        """Whether a term looks at the same distributions."""
        first = self.members[0].term
        same = first.temperature == term.temperature and first.mix is term.mix
        return same and self.width == width


@dataclass(frozen=True)
class Plan:
    """How the terms of a pass are computed.

    Attributes:
        groups: Closed forms and labels.
        free: Places and functions that autograd differentiates.
        coarse: Places and divergences on a sparse target.
    """

    groups: tuple[Group, ...]
    free: tuple[tuple[int, RowTerm], ...] = ()
    coarse: tuple[tuple[int, Tempered], ...] = ()


def plan(
    terms: Sequence[RowTerm], vocabulary: int, teacher: object, tokens: int | None = None
) -> Plan:
    """Sort terms by what they share.

    Args:
        terms: In their order.
        vocabulary: The student's.
        teacher: What says the targets; only its type is looked at.
        tokens: Its vocabulary, where it gives whole logits; by default the student's.

    Raises:
        ValueError: If there is no teacher for a divergence, or a sparse one cannot serve a term.
    """
    groups: list[Group] = []
    free: list[tuple[int, RowTerm]] = []
    coarse: list[tuple[int, Tempered]] = []
    for place, term in enumerate(terms):
        if isinstance(term, Nll):
            continue
        if isinstance(term, Alone):
            free.append((place, term))
        elif isinstance(teacher, Sparse):
            coarse.append((place, _sparse(term, teacher)))
        elif isinstance(term, Tempered) and teacher is None:
            raise ValueError("a divergence needs the teacher's logits, and there are none")
        elif isinstance(term, Tempered) and (form := closed_form(term.loss)) is not None:
            common = min(vocabulary, tokens or vocabulary)
            _join(groups, Member(place, term, form), min(term.width or common, common))
        else:
            free.append((place, term))
    labels = tuple(place for place, term in enumerate(terms) if isinstance(term, Nll))
    if labels:
        _label(groups, labels, vocabulary)
    return Plan(tuple(groups), tuple(free), tuple(coarse))


def headroom(terms: Sequence[RowTerm]) -> float:
    """Factor on slopes in fp16; 1 where one is not in closed form and may be of any size.

    >>> headroom([Nll(), Tempered(forward_kl)]), headroom([Tempered(lambda s, t: s.exp().sum(-1))])
    (64.0, 1.0)
    """
    known = (
        isinstance(term, Nll) or (isinstance(term, Tempered) and closed_form(term.loss) is not None)
        for term in terms
    )
    return HEADROOM if all(known) else 1.0


def _join(groups: list[Group], member: Member, width: int) -> None:
    """Put a divergence to those that look at the same distributions."""
    for k, group in enumerate(groups):
        if group.takes(member.term, width):
            groups[k] = replace(group, members=(*group.members, member))
            return
    groups.append(Group(width, (member,)))


def _label(groups: list[Group], labels: tuple[int, ...], vocabulary: int) -> None:
    """Put the labels to a group that has the student's plain softmax, or into one of their own."""
    for k, group in enumerate(groups):
        if group.width == vocabulary and group.members[0].term.temperature == 1.0:
            groups[k] = replace(group, labels=labels)
            return
    groups.append(Group(vocabulary, (), labels))


def _sparse(term: RowTerm, teacher: Sparse) -> Tempered:
    """A term that a sparse teacher can serve.

    Raises:
        ValueError: Saying what it would need.
    """
    if not isinstance(term, Tempered):
        raise ValueError(
            f"the teacher gives {type(teacher).__name__} targets, and {describe_function(term)} "
            "reads its whole logits; write Logits(loss=…), or take a teacher that gives them"
        )
    plain = term.loss is forward_kl and term.temperature == 1.0 and term.mix is None
    if any(isinstance(part, Counts) for part in each(teacher)) and not plain:
        raise ValueError(
            "the teacher gives sampled tokens, which are unbiased for forward_kl at temperature 1 "
            f"alone, and the term is {term}; write Logits(loss=forward_kl), or take a teacher that "
            "gives its top k"
        )
    return term
