"""The contract between objectives (specs) and terms (bound, trainable, scoring)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llm_distill import schedules
from llm_distill.rows import Batch, RowKind, Step
from llm_distill.signals import ModelSpec, Request, Signals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_distill.layers import LayerMap
    from llm_distill.losses.rowwise import RowTerm


MEASURES = ("student_nll", "teacher_nll", "kl", "agreement", "entropy")
"""What an evaluation measures beside the terms, in this order; no term may have such a name."""


@dataclass(frozen=True)
class QueryPlan:
    """Which query rows of attention maps a run samples; one plan serves all its terms.

    Attributes:
        most: Rows per sequence at most; None: all.
        rows: Among which rows they are drawn.
    """

    most: int | None
    rows: RowKind


@dataclass(frozen=True)
class Evidence:
    """One calibration batch, seen by both models.

    Attributes:
        batch: As the student reads it.
        student: What it says.
        teacher: What that says.
        more: Reads further batches, one at a time: all of them would not fit into memory.
    """

    batch: Batch
    student: Signals
    teacher: Signals
    more: Callable[[], Iterable[Evidence]] = tuple

    def member(self, number: int | None) -> Evidence:
        """The same, seen by the student and one of several teachers."""
        return replace(
            self,
            teacher=self.teacher.member(number),
            more=lambda: (each.member(number) for each in self.more()),
        )

    def every(self) -> Iterator[Evidence]:
        """All batches; both models read them, so all ranks ask for them together."""
        yield self
        yield from self.more()


class Term(nn.Module):
    """A bound objective: what to capture, what to train, how to score.

    Attributes:
        student: What it reads from the student.
        teacher: What it reads from the teacher.
        rows: The rows it counts.
        queries: The query rows it samples, for terms on attention maps.
        notes: What was decided when it was bound, for the table before training.
        mapping: Its layer map, for terms that pair layers.
        moves: Whether that map may become another one while it trains.
        gathers: Whether it compares the items of all ranks.
        adapts: Whether it wants to hear of its own value after each step.
        observes: M, sums it takes during the backward of a step; a term with any adapts.
        member: Which of several teachers it reads, and what its `teacher` is asked of; None: all.
        observed: `[M]` fp32, where it adds them up. The ledger makes it, and empties it after each
            step; no buffer, which DDP would replace by rank 0's before every forward.
    """

    adapts = False
    observes = 0
    observed: Tensor | None = None
    mapping: LayerMap | None = None
    member: int | None = None
    moves = False
    gathers = False

    def __init__(
        self,
        student: Request,
        teacher: Request,
        *,
        rows: RowKind = "supervised",
        queries: QueryPlan | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.rows: RowKind = rows
        self.queries = queries
        self.notes = tuple(notes)

    @property
    def aligned(self) -> bool:
        """Whether it compares token with token, so that both models need one tokenizer."""
        return self.teacher != Request()

    def count(self, batch: Batch) -> int:
        """Items of this batch, known on the host."""
        if self.queries is not None:
            if batch.queries is None:
                raise LookupError(
                    "this batch has no sampled queries; a term on attention maps needs them"
                )
            return batch.queries.total
        return len(batch.rows(self.rows))

    def forward(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> Tensor:
        """The sum of the values of all items: a scalar, 0 with a graph for no items."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward of its own: head terms run in the distiller's "
            "pass over the head, other terms write one"
        )

    def move(self, mapping: LayerMap) -> None:
        """Go on with another map of the same student layers: other layers of the teacher are read.

        Projectors, one for each row, are trained on.
        """
        asked, layers = self.teacher, mapping.teacher_layers
        self.teacher = replace(
            asked,
            hidden=layers if asked.hidden else asked.hidden,
            heads=layers if asked.heads else asked.heads,
            relations=layers if asked.relations else asked.relations,
        )
        told = len(str(self.mapping).splitlines())  # of the notes, at their beginning
        self.notes = (*str(mapping).splitlines(), *self.notes[told:])
        self.mapping = mapping

    def skipped(self, batch: Batch) -> int:
        """Groups of this batch that are too small for its loss, known on the host."""
        del batch
        return 0

    def figures(self) -> dict[str, float]:
        """What it tells the log beside its value, read from the device: name -> figure."""
        return {}

    def least_sequences(self) -> int:
        """Sequences that a micro-batch of all ranks needs, below which the term never counts."""
        return 1

    def alone(self, progress: float) -> bool:
        """Whether the student's blocks learn alone now; terms that do not let them are silent."""
        del progress
        return False

    def starts(self, teacher: Signals) -> dict[int, Tensor]:
        """Where blocks begin while they learn alone: block -> `[B, T, D]`."""
        del teacher
        return {}

    def factor(self) -> Tensor | None:
        """What its weight is multiplied by in the next step, `[]` on the device; None for 1."""

    def after_step(self, value: Tensor, progress: float, observed: Tensor | None = None) -> None:
        """Hear of a finished optimizer step, for terms that adapt.

        Args:
            value: Mean of the term over the step's items on all ranks, `[]`; NaN without items.
            progress: Share of the training that is done.
            observed: `[M]`, the sums over micro-batches and ranks; None for terms without any.
        """
        del value, progress, observed


class HeadTerm(Term):
    """A term that is row-wise on logits: the distiller runs all of them in one pass over the head.

    Args:
        row: (student logits `[n, V]`, teacher logits `[n, V']`, labels `[n]`) -> `[n]`: any
            function, or one that the pass has a closed form of (`losses.rowwise`).
        needs_teacher: Whether the teacher's logits are read at all.

    Attributes:
        exit: The student's layer that it looks at; None: the last.
    """

    exit: int | None = None

    def __init__(self, row: RowTerm, *, needs_teacher: bool = True) -> None:
        super().__init__(Request(logits=True), Request(logits=needs_teacher))
        self._row = row

    @property
    def row(self) -> RowTerm:
        """The row function of this step."""
        return self._row

    def values(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """One value per row of a block."""
        return self.row(student, teacher, labels)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What the student should match, and how much it counts.

    Attributes:
        weight: A number >= 0, or a schedule: a function of the training progress
            (`llm_distill.schedules`).
        name: In the log; the class name by default, numbered where there are several.

    Raises:
        ValueError: For a weight that is negative or not finite at any point of the training.
    """

    weight: float | schedules.Schedule = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        """Refuse impossible weights at once."""
        schedules.check(self.weight, self.name or type(self).__name__)

    def survey(self, student: ModelSpec, teacher: ModelSpec) -> tuple[Request, Request]:
        """Signals of the calibration batch it needs before it can be built; none for most."""
        del student, teacher
        return Request(), Request()

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do without what it surveys."""
        return True

    @abstractmethod
    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to two models; parts that need the evidence stay undecided without it."""

    def describe(self) -> str:
        """Its settings in a few words, for tables."""
        return ""


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Refuse a list that trains nothing.

    Raises:
        ValueError: If it is empty, or every weight is zero for the whole run.
    """
    if isinstance(objectives, Objective):
        raise ValueError(f"objectives: a list is asked for; write [{type(objectives).__name__}(…)]")
    if not objectives:
        raise ValueError("objectives: the list is empty; write at least one, such as Logits()")
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise ValueError(
                f"objectives: {objective!r} is no Objective; write one of CrossEntropy(), "
                "Logits(), …"
            )
    if all(schedules.at(o.weight, k / 100) == 0 for o in objectives for k in range(101)):
        raise ValueError(
            "objectives: every weight is 0 for the whole run; nothing would be trained"
        )


def named(objectives: Sequence[Objective]) -> dict[str, Objective]:
    """Each objective under the name it has in the log.

    Raises:
        ValueError: If two have the same name, or one has that of an evaluation's figure.
    """
    result: dict[str, Objective] = {}
    seen: dict[str, int] = {}
    for objective in objectives:
        kind = type(objective).__name__
        seen[kind] = seen.get(kind, 0) + 1
        name = objective.name or (kind if seen[kind] == 1 else f"{kind}.{seen[kind]}")
        if name in MEASURES:
            raise ValueError(
                f"objectives: one is named {name!r}, as a figure of every evaluation; write another"
            )
        if name in result:
            raise ValueError(f"objectives: two are named {name!r}; give each a name of its own")
        result[name] = objective
    return result
