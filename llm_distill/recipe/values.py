"""Values of a recipe as the type hints of Python want them, checked strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from llm_distill.errors import InputError

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_LISTS = (list, tuple, set, frozenset, Sequence, Collection, Iterable)
_MAPPINGS = (dict, Mapping)


@dataclass(frozen=True)
class Place:
    """Where in a recipe something stands.

    Attributes:
        path: `objectives[1].Logits.loss`, for messages.
        field: The field whose value it is, `loss`; list entries have that of their list.

    >>> print(Place("objectives").entry(1).key("Logits").key("loss"))
    objectives[1].Logits.loss
    """

    path: str
    field: str = ""

    def __str__(self) -> str:
        """The path."""
        return self.path

    def key(self, name: str) -> Place:
        """A key of the mapping here."""
        return Place(f"{self.path}.{name}", name)

    def entry(self, index: int) -> Place:
        """An entry of the list here."""
        return Place(f"{self.path}[{index}]", self.field)


Make = Callable[[Any, Any, Place], Any]
"""(what a recipe says, type hint, place) -> a component."""


def convert(value: Any, hint: Any, place: Place, make: Make) -> Any:  # noqa: ANN401  any type
    """A value as its type hint wants it.

    Args:
        value: From YAML.
        hint: A type as `typing.get_type_hints` gives it.
        place: For messages, and to look up names.
        make: Makes a component, for hints that are functions or classes.

    Raises:
        InputError: If the value is of another type.
    """
    hint = _chosen(value, hint, getattr(make, "makers", ()))
    kind = kind_of(hint)
    if kind in ("any", "null"):
        if kind == "null" and value is not None:
            raise _wrong(value, hint, place)
        return value
    if kind in ("function", "class"):
        return make(value, hint, place)
    return _CONVERTERS[kind](value, hint, place, make)


def kind_of(hint: Any) -> str:  # noqa: ANN401  any type
    """Which of our few kinds a type hint is.

    >>> [kind_of(hint) for hint in (int, str | None, Mapping[str, int], Callable[[int], int])]
    ['int', 'union', 'mapping', 'function']
    """
    origin = get_origin(hint) or hint
    named: dict[Any, str] = {
        Any: "any",
        object: "any",
        NoneType: "null",
        None: "null",
        Literal: "literal",
    }
    named |= {Union: "union", UnionType: "union", Callable: "function", Literal: "literal"}
    named |= {bool: "bool", int: "int", float: "float", str: "str"}
    named |= dict.fromkeys(_LISTS, "list") | dict.fromkeys(_MAPPINGS, "mapping")
    if origin in named:
        return named[origin]
    if isinstance(origin, type):
        return "enum" if issubclass(origin, Enum) else "class"
    return "any"


def wanted(hint: Any) -> str:  # noqa: ANN401  any type
    """A type in words.

    >>> wanted(float | None), wanted(Literal["a", "b"]), wanted(list[int])
    ('a number or null', 'one of a, b', 'a list')
    """
    kind = kind_of(hint)
    if kind == "union":
        words = dict.fromkeys(wanted(member) for member in sorted(get_args(hint), key=_null_last))
        return " or ".join(words)
    if kind in ("literal", "enum"):
        return f"one of {', '.join(map(str, _words(hint)))}"
    names = {"any": "anything", "bool": "true or false", "int": "an integer", "float": "a number"}
    names |= {"str": "text", "list": "a list", "mapping": "a mapping", "function": "a name"}
    return names.get(kind, kind if kind == "null" else getattr(hint, "__name__", str(hint)))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'this'?`, or nothing.

    >>> did_you_mean("temprature", ["temperature", "scaling"])
    "; did you mean 'temperature'?"
    """
    by_lower = {known.lower(): known for known in words}
    near = get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def _chosen(value: Any, hint: Any, made: Collection[Any]) -> Any:  # noqa: ANN401  any type
    """The member of a union that a value is meant for; the union itself where none fits.

    Text may name one that has a maker of its own, which knows names from other text.
    """
    if kind_of(hint) != "union":
        return hint
    own = [member for member in get_args(hint) if member in made]
    if own and isinstance(value, str):
        return own[0]
    members = {kind_of(member): member for member in reversed(get_args(hint))}
    fitting = [kind for kind in _preferred(value) if kind in members]
    return members[fitting[0]] if fitting else hint


def _preferred(value: Any) -> Sequence[str]:  # noqa: ANN401  any YAML
    """Which kinds a value may be, the most specific first."""
    if isinstance(value, str):
        number = _NUMBER.fullmatch(value)
        names = ("str", "float", "int", "function") if number else ("function", "str", "class")
        return ("enum", "literal", *names, "any")
    kinds: dict[type, tuple[str, ...]] = {
        NoneType: ("null",),
        bool: ("bool", "literal"),
        int: ("int", "float", "literal"),
        float: ("float", "int"),
        list: ("list",),
        dict: ("mapping", "function", "class"),
    }
    return (*kinds.get(type(value), ()), "any")


def _bool(value: Any, hint: Any, place: Place, make: Make) -> bool:  # noqa: ANN401
    del make
    if not isinstance(value, bool):
        raise _wrong(value, hint, place)
    return value


def _float(value: Any, hint: Any, place: Place, make: Make) -> float:  # noqa: ANN401
    del make
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(value, hint, place)
    if not math.isfinite(value):
        raise InputError(f"{place}: {value} is not finite; write a finite number")
    return float(value)


def _int(value: Any, hint: Any, place: Place, make: Make) -> int:  # noqa: ANN401
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind_of(hint) == "union" or isinstance(value, bool):
        raise _wrong(value, hint, place)
    number = _float(value, hint, place, make)
    if not number.is_integer():
        raise _wrong(value, hint, place)
    return int(number)


def _str(value: Any, hint: Any, place: Place, make: Make) -> str:  # noqa: ANN401
    del make
    if not isinstance(value, str):
        quoted = f", in quotes: '{value}'" if isinstance(value, bool | int | float) else ""
        raise InputError(f"{_wrong(value, hint, place)}{quoted}")
    return value


def _word(value: Any, hint: Any, place: Place, make: Make) -> Any:  # noqa: ANN401
    """A member of a Literal, or the value of one of an Enum."""
    del make
    words = _words(hint)
    if not any(value == word and type(value) is type(word) for word in words):
        near = did_you_mean(str(value), map(str, words))
        raise InputError(f"{_wrong(value, hint, place)}{near}")
    return value


def _list(value: Any, hint: Any, place: Place, make: Make) -> Any:  # noqa: ANN401
    if not isinstance(value, list):
        raise _wrong(value, hint, place)
    kind, members = get_origin(hint) or hint, get_args(hint) or (Any,)
    if kind is tuple and Ellipsis not in members and len(members) != len(value):
        raise InputError(f"{place}: {value!r} has {len(value)} entries; write {len(members)}")
    each = members if kind is tuple and Ellipsis not in members else [members[0]] * len(value)
    pairs = enumerate(zip(value, each, strict=True))
    entries = [convert(v, h, place.entry(i), make) for i, (v, h) in pairs]
    return kind(entries) if kind in (tuple, set, frozenset) else entries


def _mapping(value: Any, hint: Any, place: Place, make: Make) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        raise _wrong(value, hint, place)
    _, member = get_args(hint) or (str, Any)
    return {key: convert(entry, member, place.key(key), make) for key, entry in value.items()}


def _union(value: Any, hint: Any, place: Place, make: Make) -> Any:  # noqa: ANN401
    """No member fits."""
    del make
    raise _wrong(value, hint, place)


def _words(hint: Any) -> Sequence[Any]:  # noqa: ANN401
    """What a Literal or an Enum allows, as a recipe writes it."""
    if kind_of(hint) == "literal":
        return get_args(hint)
    return [member.value for member in hint]


def _null_last(hint: Any) -> bool:  # noqa: ANN401
    return kind_of(hint) == "null"


def _wrong(value: Any, hint: Any, place: Place) -> InputError:  # noqa: ANN401
    """Say what there is and what there should be."""
    return InputError(f"{place}: {value!r} is not what this takes; write {wanted(hint)}")


_CONVERTERS: Mapping[str, Callable[[Any, Any, Place, Make], Any]] = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "str": _str,
    "literal": _word,
    "enum": _word,
    "list": _list,
    "mapping": _mapping,
    "union": _union,
}
