"""Hidden states: the student's, projected, should be the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from llm_distill import projectors, schedules
from llm_distill.layers import asks, looks
from llm_distill.losses.described import describe_function
from llm_distill.losses.features import mse
from llm_distill.losses.needs import Items, Needs, needs
from llm_distill.objectives.blockwise import Blockwise
from llm_distill.objectives.checks import (
    check_choice,
    check_function,
    check_row_function,
)
from llm_distill.objectives.mapped import Mapped
from llm_distill.objectives.states import Comparison, HiddenStatesTerm, Normalization
from llm_distill.picks import Pick
from llm_distill.rows import RowKind
from llm_distill.signals import ModelSpec, Request

if TYPE_CHECKING:
    from llm_distill.layers import LayerMap
    from llm_distill.objectives.base import Evidence, Term

CHOICES = {
    "init": ("random", "least_squares"),
    "normalize": ("none", "layer", "l2"),
    "rows": ("supervised", "valid"),
    "items": ("token", "sequence", "pooled"),
}
"""Settings that are a word, or left out."""

PairLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Mapped):
    """Hidden states of mapped layers, mean over pairs and items.

    Attributes:
        loss: (student `[N, D]`, teacher `[N, D]`) -> `[N]`, one value per row; or one that relates
            the rows of a group to each other (`pkt`, `rkd_distance`, `cka`, …), which takes any two
            widths.
        projector: From the student's width to the teacher's (`llm_distill.projectors`), one for
            each pair. By default none for equal widths and losses that relate rows, else linear.
        init: `random`, or `least_squares`: projectors start at the closed-form optimum of 32
            training examples. By default that, for `linear` and `orthogonal` ones without
            `blockwise`, of up to 128 examples read one by one: until there are 32 rows for each
            feature of the student; with less than 2, they stay random.
        normalize: What both sides go through before the loss, row by row: `layer` (zero mean, unit
            variance; the residual stream grows with depth), `l2` (unit length), `none`. By default
            `layer`, and `none` for losses that relate rows.
        rows: `supervised` predictions, or every `valid` token. By default the first, and the second
            for masked models, where few tokens are asked for and all have a state to learn.
        items: `token`: every row counts alike; `sequence`: the loss sees one sequence at a time,
            and sequences count alike; `pooled`: the mean of each sequence's rows is one row. By
            default what the loss is meant for.
        skip: Tokens at the start of each sequence that are left out (attention sinks).
        most: Rows that are compared at once, drawn anew in each epoch; by default all, or what the
            loss's memory allows.
        gate: Let the hint go once its gradient at the student's hidden states is, on average,
            against that of everything else: hints can hurt.
        blockwise: Share of the training, at its start, in which nothing else is trained and every
            student block learns alone: it is given the teacher's state where its segment of the map
            begins, and learns the state where it ends, |s - t| / sqrt(D). It mends a bad start and
            slows a good one.

    Relations among the rows of a batch see one micro-batch on one rank at a time: unlike losses of
    single rows they change with its size. A group too small for its loss is skipped, and counted in
    the log.

    Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, equation 3.
    """

    loss: PairLoss = mse
    projector: Callable[[int, int], nn.Module] | None = None
    init: Literal["random", "least_squares"] | None = None
    normalize: Normalization | None = None
    rows: RowKind | None = None
    items: Items | None = None
    skip: int = 0
    most: int | None = None
    gate: bool = True
    blockwise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        for name, choices in CHOICES.items():
            chosen = vars(self)[name]
            if chosen is not None:
                check_choice(f"HiddenStates: {name}", chosen, choices)
        check_function("HiddenStates", "loss", self.loss, "llm_distill")
        if self.projector is not None:
            check_function("HiddenStates", "projector", self.projector, "llm_distill.projectors")
        if self.skip < 0:
            raise ValueError(f"HiddenStates: skip is {self.skip}; write a number of tokens >= 0")
        if self.most is not None and self.most < self.needs.least:
            raise ValueError(
                f"HiddenStates: most is {self.most}, and {describe_function(self.loss)} needs "
                f"{self.needs.least} rows; write at least that, or leave it out"
            )
        if not 0.0 <= self.blockwise < 1.0:
            raise ValueError(
                f"HiddenStates: blockwise is {self.blockwise}; write a share of the training, from "
                "0 (never) to less than 1"
            )
        check_row_function(self.loss, (5, 3), "HiddenStates")

    @property
    def needs(self) -> Needs:
        """What the loss needs."""
        return needs(self.loss)

    @property
    def choice(self) -> Pick:
        """The rows and groups it asks for."""
        default = self.needs
        items = self.items or default.items
        most = default.most if self.most is None else self.most
        return Pick(self.rows or "supervised", items, self.skip, most, default.least)

    def survey(self, student: ModelSpec, teacher: ModelSpec) -> tuple[Request, Request]:
        """The mapped layers, where projectors are fitted."""
        if not self._fits(student, teacher):
            return Request(), Request()
        mapping = self.mapping(student, teacher)
        return Request(hidden=mapping.student_layers), Request(hidden=mapping.teacher_layers)

    @property
    def needs_data(self) -> bool:
        """Whether the user asked for projectors that are fitted."""
        return self.init is not None

    def build(
        self, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None = None
    ) -> Term:
        """Bind to layers and widths; fit the projectors if there is evidence for it."""
        mapping = self.mapping(student, teacher)
        make = self.projector or self._projector(student.width == teacher.width)
        modules = [make(student.width, teacher.width) for _ in mapping.rows]
        normalize = self.normalize or self.needs.normalize
        redraw = self.layers if "epoch" in asks(self.layers) else None
        term = HiddenStatesTerm(
            Comparison(self.loss, self.choice, normalize),
            mapping,
            modules,
            redraw=redraw,
            gated=self.gate,
            start=self._start(mapping, student, teacher),
        )
        if self._fits(student, teacher):
            term.fit(evidence, asked=self.init is not None)
        return term

    def describe(self) -> str:
        """Loss, normalisation, rows and items."""
        choice, normal = self.choice, self.normalize or self.needs.normalize
        parts = [describe_function(self.loss), f"normalize {normal}", f"{choice.rows} rows"]
        if choice.items != "token":
            parts.append(f"items {choice.items}")
        if choice.skip:
            parts.append(f"without the first {choice.skip} tokens")
        if choice.most is not None:
            parts.append(f"at most {choice.most} at once")
        return ", ".join(parts)

    def _start(
        self, mapping: LayerMap, student: ModelSpec, teacher: ModelSpec
    ) -> tuple[Blockwise, float] | None:
        """Blocks that learn alone at first."""
        if not self.blockwise:
            return None
        if looks(self.layers):
            raise ValueError(
                "HiddenStates: blockwise trains the segments of one map, and "
                f"{describe_function(self.layers)} may move it; write refresh: 0, or blockwise: 0"
            )
        silent = [k / 100 for k in range(100) if k / 100 < self.blockwise]
        silent = [progress for progress in silent if not schedules.at(self.weight, progress)]
        if silent:
            raise ValueError(
                f"HiddenStates: blockwise trains nothing else until {self.blockwise:.0%}, and its "
                f"weight is 0 at {silent[0]:.0%}; write a weight > 0 for that long, such as "
                f"{{step: {{before: 1.0, after: 0.0, at: {self.blockwise:g}}}}}"
            )
        bare = self.projector is None and not self.needs.same_width
        if bare and student.width != teacher.width:
            raise ValueError(
                f"HiddenStates: blockwise needs a projector from {student.width} to "
                f"{teacher.width} features, and {describe_function(self.loss)} has none; write "
                "projector: linear"
            )
        return Blockwise(mapping, student.width, teacher.width), self.blockwise

    def _fits(self, student: ModelSpec, teacher: ModelSpec) -> bool:
        """Whether projectors start at their optimum."""
        if self.init is not None or self.blockwise:  # whose states are compared as they are
            return self.init == "least_squares"
        made = self.projector or self._projector(student.width == teacher.width)
        return made in (projectors.linear, projectors.orthogonal)

    def _projector(self, same: bool) -> Callable[[int, int], nn.Module]:  # noqa: FBT001  private
        """The projector that nobody named."""
        if not self.needs.same_width:
            return projectors.none
        return projectors.identity if same else projectors.linear
