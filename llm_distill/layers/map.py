"""One value that says which layer of the student learns from which layers of the teacher.

Layers are numbered as `hidden_states` of transformers: 0 is the embedding, k = 1..depth is the
output of block k (the last one after the final norm), so that one map serves hidden states and the
heads of block k alike. Negative numbers count from the end, -1 is the last block.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from llm_distill.errors import InputError
from llm_distill.layers import entries, files

SUM_TOLERANCE = 1e-6
"""How far from 1 the shares of a row may sum: a hand-written 0.333 three times is refused."""

LEAST_PRINTED = 0.01
"""Shares below this are printed as one rest."""


@dataclass(frozen=True)
class Row:
    """A layer of the student and its target: one layer of the teacher, or a mixture of several.

    Attributes:
        student: The layer that learns.
        teacher: (layer, share) of the mixture; shares are > 0 and sum to 1.
        weight: What the row counts against the other rows, >= 0.
    """

    student: int
    teacher: tuple[tuple[int, float], ...]
    weight: float = 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        """The teacher's layers of the mixture."""
        return tuple(layer for layer, _ in self.teacher)


@dataclass(frozen=True)
class LayerMap:
    """Rows of a layer map, and where they came from.

    A map is a strategy itself: called with its own two depths it returns itself.

    Attributes:
        rows: Ascending; a layer may stand in more than one row on either side.
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.
        origin: The strategy in words.
        trained: Whether the shares are where training starts, rather than fixed.
        evidence: (what, figure) that the choice rests on, to be printed.

    Raises:
        ValueError: If there is no row, a layer does not exist, shares do not sum to 1, weights are
            negative or all 0, or a row stands twice.

    >>> print(LayerMap.of([(1, 3), (-1, -1)], 2, 6, "by hand"))
    student layer | teacher layer   by hand
                1 | 3 of 6
                2 | 6 of 6
    """

    rows: tuple[Row, ...]
    student_depth: int
    teacher_depth: int
    origin: str
    trained: bool = False
    evidence: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Resolve negative layers and refuse what cannot be."""
        if not self.rows:
            raise ValueError(
                f"layers: {self.origin} maps no layer for depths {self.student_depth} and "
                f"{self.teacher_depth}"
            )
        rows = [resolved(row, self.student_depth, self.teacher_depth) for row in self.rows]
        places = [(row.student, row.layers) for row in rows]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise ValueError(
                f"layers: a row stands twice, student layer {twice[0]} from teacher layers "
                f"{list(twice[1])}; write each row once and use `weight`"
            )
        if not any(row.weight for row in rows):
            raise ValueError(
                "layers: all rows have weight 0; give one a weight > 0, or leave out the objective"
            )
        rows.sort(key=lambda row: (row.student, row.layers))
        object.__setattr__(self, "rows", tuple(rows))

    @classmethod
    def of(
        cls,
        pairs: Iterable[tuple[int, int]],
        student_depth: int,
        teacher_depth: int,
        origin: str,
        evidence: tuple[tuple[str, float], ...] = (),
    ) -> "LayerMap":
        """A map of (student layer, teacher layer), one row of weight 1 each.

        Raises:
            ValueError: If a layer does not exist, a pair stands twice, or there is no pair.
        """
        rows = tuple(Row(s, ((t, 1.0),)) for s, t in pairs)
        return cls(rows, student_depth, teacher_depth, origin, evidence=evidence)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) of every entry of every row, in the order of the rows."""
        return tuple((row.student, layer) for row in self.rows for layer in row.layers)

    @property
    def student_layers(self) -> frozenset[int]:
        """The student's layers that take part."""
        return frozenset(row.student for row in self.rows)

    @property
    def teacher_layers(self) -> frozenset[int]:
        """The teacher's layers that take part."""
        return frozenset(layer for row in self.rows for layer in row.layers)

    def __call__(self, student_depth: int, teacher_depth: int) -> "LayerMap":
        """Itself, for the depths it was made for.

        Raises:
            ValueError: For other depths.
        """
        if (student_depth, teacher_depth) == (self.student_depth, self.teacher_depth):
            return self
        raise ValueError(
            f"layers: this map ({self.origin}) is for a student of {self.student_depth} blocks and "
            f"a teacher of {self.teacher_depth}; these have {student_depth} and {teacher_depth}: "
            "make one for them (llm-distill map), or write a strategy such as auto or uniform"
        )

    def __str__(self) -> str:
        """A small table."""
        trained = ", shares are trained" if self.trained else ""
        lines = [f"student layer | teacher layer   {self.origin}{trained}"]
        weighed = len({row.weight for row in self.rows}) > 1
        for row in self.rows:
            weight = f", weight {row.weight:g}" if weighed else ""
            lines.append(f"{row.student:>13} | {target(row)} of {self.teacher_depth}{weight}")
        lines += [f"{what}: {figure:.4g}" for what, figure in self.evidence]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the map as YAML that a person can edit and `load` reads."""
        head = {
            "student_depth": self.student_depth,
            "teacher_depth": self.teacher_depth,
            "origin": self.origin,
            "trained": self.trained,
        }
        if self.evidence:
            head["evidence"] = dict(self.evidence)
        files.write(Path(path), head, [_written(row) for row in self.rows])

    @classmethod
    def load(cls, path: str | Path) -> "LayerMap":
        """The map in a file.

        Raises:
            InputError: If there is no such file, or an entry cannot be; it says which.
        """
        file = Path(path).expanduser()
        given = entries.Entries(files.read(file), file)
        student_depth, teacher_depth = given.depths()
        rows = []
        for place, student, teacher, weight in given.rows():
            try:
                rows.append(resolved(Row(student, teacher, weight), student_depth, teacher_depth))
            except ValueError as error:
                raise InputError(f"{place}: {error}") from error
        try:
            return cls(
                tuple(rows),
                student_depth,
                teacher_depth,
                given.text("origin", f"saved in {file.name}"),
                given.switch("trained"),
                given.figures("evidence"),
            )
        except ValueError as error:
            raise InputError(f"{file}: {error}") from error


LayerStrategy = Callable[[int, int], LayerMap]
"""(student depth, teacher depth) -> map."""


def resolved(row: Row, student_depth: int, teacher_depth: int) -> Row:
    """A row with layers counted from the start and ascending.

    Raises:
        ValueError: If a layer does not exist or stands twice, a share is not > 0, shares do not sum
            to 1, or the weight is negative or not finite.
    """
    student = resolve(row.student, student_depth, "student")
    teacher = sorted((resolve(t, teacher_depth, "teacher"), share) for t, share in row.teacher)
    where = f"layers: student layer {student}"
    if len({layer for layer, _ in teacher}) < len(teacher):
        raise ValueError(
            f"{where} names a teacher layer twice in {[t for t, _ in teacher]}; write its share "
            "once"
        )
    wrong = [(layer, share) for layer, share in teacher if not 0 < share < math.inf]
    if wrong:
        layer, share = wrong[0]
        raise ValueError(
            f"{where} takes a share of {share} from teacher layer {layer}; shares are > 0: leave "
            "out a layer that has none"
        )
    total = math.fsum(share for _, share in teacher)
    if abs(total - 1) > SUM_TOLERANCE:
        shares = ", ".join(f"{layer}: {share / total:.6g}" for layer, share in teacher)
        instead = f"write {{{shares}}}" if teacher else "name a teacher layer"
        raise ValueError(f"{where} has shares that sum to {total:.6g}, not 1; {instead}")
    if not 0 <= row.weight < math.inf:
        raise ValueError(f"{where} has weight {row.weight}; it must be finite and >= 0")
    return replace(row, student=student, teacher=tuple(teacher))


def resolve(layer: int, depth: int, side: str) -> int:
    """A layer number in 0..depth, negative ones counted from the end.

    Raises:
        ValueError: If there is no such layer.

    >>> resolve(-1, 4, "student"), resolve(0, 4, "student")
    (4, 0)
    """
    if not -depth <= layer <= depth:
        raise ValueError(
            f"layers: {side} layer {layer} is out of range 0..{depth} (0 is the embedding, {depth} "
            "the last)"
        )
    return layer + depth + 1 if layer < 0 else layer


def target(row: Row) -> str:
    """The teacher's side of a row in words."""
    if len(row.teacher) == 1:
        return str(row.layers[0])
    shown = [(layer, share) for layer, share in row.teacher if share >= LEAST_PRINTED]
    words = [f"{layer} ({share:.0%})" for layer, share in shown]
    rest = 1 - math.fsum(share for _, share in shown)
    if len(shown) < len(row.teacher):
        words.append(f"{len(row.teacher) - len(shown)} more ({rest:.1%})")
    return " + ".join(words)


def _written(row: Row) -> dict[str, object]:
    """A row as YAML has it: what is usual is left out."""
    written: dict[str, object] = {"student": row.student}
    written["teacher"] = row.layers[0] if len(row.teacher) == 1 else dict(row.teacher)
    return written if row.weight == 1 else written | {"weight": row.weight}
