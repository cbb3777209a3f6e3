"""What teachers tell of a row, known before any of them is heard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_distill.cache.kinds import Top
from llm_distill.errors import InputError
from llm_distill.teachers.cached import Cached
from llm_distill.teachers.local import Local
from llm_distill.teachers.members import Composite
from llm_distill.teachers.remote import Remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.teachers.base import Teacher

UNKNOWN = "unknown"
"""The form of a teacher of the user's own."""

LIKELIEST = "the likeliest"
"""How the form of top-k targets begins."""


def form_of(teacher: Teacher) -> str | None:
    """Which few tokens of each row a teacher tells; None where it tells all.

    Of kinds that are not ours nobody knows before they are heard.

    >>> form_of(Remote("http://gpu-box:8000", "an/id", 20))
    'the likeliest 20'
    """
    if isinstance(teacher, Composite):
        return teacher.form()
    if isinstance(teacher, Remote):
        return f"{LIKELIEST} {teacher.top_k}"
    if not isinstance(teacher, Cached):
        return None if isinstance(teacher, Local) else UNKNOWN
    kept = teacher.store.manifest.estimator
    if isinstance(kept, Top):
        return f"{LIKELIEST} {kept.k}"
    return None if kept.example() is None else str(kept)


def cut(teacher: Teacher, tokens: int) -> Teacher:
    """A teacher for a student of so many tokens, of which every server in it has to know.

    Whole distributions are cut where they are compared; a few tokens of each row cannot be.
    """
    if isinstance(teacher, Remote):
        return teacher.cut(tokens) if tokens < teacher.spec.vocabulary else teacher
    if not isinstance(teacher, Composite):
        return teacher
    found = [cut(member, tokens) for member in teacher.teachers]
    same = all(one is two for one, two in zip(found, teacher.teachers, strict=True))
    return teacher if same else teacher.of(found)


def forms(owner: str, teachers: Sequence[Teacher]) -> list[str | None]:
    """Those of members, of which all or none tell a few tokens.

    Raises:
        InputError: For some that do and some that do not.
    """
    found = [form_of(teacher) for teacher in teachers]
    if None in found and any(form not in (None, UNKNOWN) for form in found):
        named = ", ".join(
            f"{teacher.spec.name} tells {form or 'all tokens'}"
            for teacher, form in zip(teachers, found, strict=True)
        )
        raise InputError(
            f"{owner}: {named} of each row, and the two cannot be one distribution; take members "
            "that tell all (Local, Cached with keep: hidden), or only such that tell a few"
        )
    return found


def common_form(owner: str, names: Sequence[str], teachers: Sequence[Teacher]) -> str | None:
    """The form of teachers whose rows are one table.

    Raises:
        InputError: For some that tell other tokens than the others.
    """
    found = forms(owner, teachers)
    if UNKNOWN in found:
        return UNKNOWN
    if len(set(found)) == 1 and (found[0] or LIKELIEST).startswith(LIKELIEST):
        return found[0]
    told = ", ".join(f"{name}: {form}" for name, form in zip(names, found, strict=True))
    raise InputError(
        f"{owner}: its experts tell a few tokens of each row ({told}), and their rows are one "
        "table; let all tell the same number of likeliest ones, or all tokens (Local, Cached with "
        "keep: hidden)"
    )
