"""The student and the teacher of a recipe, as specs; code from the Hub only where it is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_distill.errors import InputError
from llm_distill.recipe.components import Components, is_spec, split
from llm_distill.recipe.values import Place

if TYPE_CHECKING:
    from collections.abc import Callable

TEACHES = {"config", "spec", "find_tokenizer", "open"}
"""What a teacher can do."""


def student_of(value: Any, make: Components) -> Any:  # noqa: ANN401  a spec
    """The student's spec.

    Raises:
        InputError: For what is none, or for code that is not allowed.
    """
    from llm_distill.students import Made
    from llm_distill.teachers import Local

    def fits(kind: type) -> bool:
        return issubclass(kind, Local | Made)

    instead = "a Hub id, a path, Local, FromConfig or FromTeacher"
    return _model(value, Place("student"), make, fits, instead)


def teacher_of(
    value: Any,  # noqa: ANN401  any YAML
    make: Components,
    place: Place = Place("teacher"),  # noqa: B008  frozen
) -> Any:  # noqa: ANN401  a spec
    """The teacher's spec, or that of a member of several.

    Raises:
        InputError: As `student_of`.
    """

    def fits(kind: type) -> bool:
        return set(dir(kind)) >= TEACHES

    return _model(value, place, make, fits, f"a Hub id, a path, or one of {_teachers(fits)}")


def _teachers(fits: Callable[[type], bool]) -> str:
    """The kinds of teachers."""
    import llm_distill

    public = (getattr(llm_distill, name) for name in llm_distill.__all__)
    return ", ".join(kind.__name__ for kind in public if isinstance(kind, type) and fits(kind))


def teachers() -> dict[type, Callable[..., Any]]:
    """How a recipe's members of several teachers are made, for `Components`."""
    from llm_distill.teachers import Teacher

    return {Teacher: teacher_of}


def _model(
    value: Any,  # noqa: ANN401  any YAML
    place: Place,
    make: Components,
    fits: Callable[[type], bool],
    instead: str,
) -> Any:  # noqa: ANN401  a spec
    """A spec of a class that fits; a bare id or path is a `Local`."""
    import llm_distill
    from llm_distill.teachers import Local, leaves

    if isinstance(value, str) and value not in llm_distill.__all__ and ":" not in value:
        if not value.strip():
            raise InputError(f"{place} is empty; write {instead}")
        return Local(value)
    name, arguments = split(value, place)
    found = make.find(name, place)
    if not (isinstance(found, type) and is_spec(found) and fits(found)):
        what = place.path.partition(".")[0]
        raise InputError(f"{place}: {name!r} is no {what}; write {instead}")
    spec = make.spec(found, arguments, place, place.key(name))
    for each in leaves(spec):
        _refuse_code(each, place.key(name), make)
    return spec


def _refuse_code(spec: Any, here: Place, make: Components) -> None:  # noqa: ANN401  a spec
    """Refuse code from the Hub that the user did not allow."""
    from llm_distill.students import FromConfig
    from llm_distill.teachers import Local

    given = spec.config if isinstance(spec, FromConfig) else vars(spec)
    for key in ("attn_implementation", "_attn_implementation"):
        kernel = str(given.get(key) or "")
        if "/" in kernel and kernel not in make.allowed:
            raise InputError(
                f"{here}.{key}: {kernel!r} is a kernel from the Hub, which is code; if you trust "
                f"it, run with --allow-code {kernel}"
            )
    for name, part in vars(spec).items():
        if isinstance(part, Local):  # the teacher of a cache
            _refuse_code(part, here.key(name), make)
    if isinstance(spec, Local) and spec.trust_remote_code and spec.model not in make.allowed:
        raise InputError(
            f"{here}.trust_remote_code: code from the repository of {spec.model} would run; if you "
            f"trust it, run with --allow-code {spec.model}"
        )
