"""The entries of a saved layer map, each checked; messages name the file and the entry."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llm_distill.errors import InputError

KEYS = ("student_depth", "teacher_depth", "origin", "trained", "evidence", "rows")
ROW_KEYS = ("student", "teacher", "weight")


@dataclass(frozen=True)
class Entries:
    """What a file says.

    Attributes:
        document: The mapping in it.
        file: Where it was read, for messages.

    Raises:
        InputError: For a key that no map has.
    """

    document: Mapping[Any, Any]
    file: Path

    def __post_init__(self) -> None:
        """Refuse unknown keys."""
        _refuse_unknown(self.document, KEYS, f"{self.file}")

    def depths(self) -> tuple[int, int]:
        """Blocks of the student and of the teacher.

        Raises:
            InputError: If one is missing or no whole number >= 1.
        """
        found = []
        for name in ("student_depth", "teacher_depth"):
            depth = self.document.get(name)
            if type(depth) is not int or depth < 1:
                raise InputError(
                    f"{self.file}: {name}: {_shown(depth)} is no number of blocks; write a whole "
                    "number >= 1"
                )
            found.append(depth)
        return found[0], found[1]

    def rows(self) -> Iterator[tuple[str, int, tuple[tuple[int, float], ...], float]]:
        """The place of a row in words, its student layer, teacher layers with shares, and weight.

        Raises:
            InputError: For what is no row.
        """
        rows = self.document.get("rows")
        if not isinstance(rows, list) or not rows:
            raise InputError(
                f"{self.file}: rows: {_shown(rows)} is no list of rows; write "
                "[{student: 1, teacher: 3}, …]"
            )
        for number, row in enumerate(rows):
            place = f"{self.file}: rows[{number}]"
            if not isinstance(row, dict):
                raise InputError(f"{place}: {row!r} is no row; write {{student: 1, teacher: 3}}")
            _refuse_unknown(row, ROW_KEYS, place)
            student = _layer(row.get("student"), f"{place}.student")
            weight = _number(row.get("weight", 1.0), f"{place}.weight")
            yield place, student, _shares(row.get("teacher"), f"{place}.teacher"), weight

    def text(self, name: str, default: str) -> str:
        """A text; the default where it is left out.

        Raises:
            InputError: If it is something else.
        """
        value = self.document.get(name, default)
        if not isinstance(value, str):
            raise InputError(f"{self.file}: {name}: {value!r} is no text; put it in quotes")
        return value

    def switch(self, name: str) -> bool:
        """True or false; false where it is left out.

        Raises:
            InputError: If it is something else.
        """
        value = self.document.get(name, False)
        if not isinstance(value, bool):
            raise InputError(f"{self.file}: {name}: {value!r} is neither true nor false")
        return value

    def figures(self, name: str) -> tuple[tuple[str, float], ...]:
        """Named figures, or none.

        Raises:
            InputError: If they are something else.
        """
        value = self.document.get(name) or {}
        if not isinstance(value, dict):
            raise InputError(f"{self.file}: {name}: {value!r} has no names; write {{name: number}}")
        place = f"{self.file}: {name}"
        return tuple((str(k), _number(v, f"{place}.{k}")) for k, v in value.items())


def _shares(value: object, place: str) -> tuple[tuple[int, float], ...]:
    """Teacher layers with shares: one layer alone has all of it."""
    if not isinstance(value, dict):
        return ((_layer(value, place), 1.0),)
    return tuple((_layer(k, place), _number(v, f"{place}[{k}]")) for k, v in value.items())


def _layer(value: object, place: str) -> int:
    """A whole number, and no switch: `true` is 1 for Python."""
    if type(value) is int:
        return value
    raise InputError(
        f"{place}: {_shown(value)} is no layer number; write one such as 3, or -1 for the last"
        + (", or shares such as {5: 0.25, 6: 0.75}" if place.endswith("teacher") else "")
    )


def _number(value: object, place: str) -> float:
    """A finite number; `1e-3` too, which YAML 1.1 reads as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # tried
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{place}: {_shown(value)} is no finite number; write one such as 0.5")
    return number


def _refuse_unknown(given: Mapping[Any, Any], known: tuple[str, ...], place: str) -> None:
    """Refuse a key that is not there, with the nearest that is."""
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise InputError(f"{place}: there is no {key!r} in a layer map; {hint}")


def _shown(value: object) -> str:
    """A value for a message."""
    return "nothing" if value is None else repr(value)
