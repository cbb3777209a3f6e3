"""Several teachers of which each example has one: its expert, by a column of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from llm_distill.errors import InputError
from llm_distill.losses.blending import Switch
from llm_distill.losses.sparse import TopK
from llm_distill.pieces import in_pieces
from llm_distill.signals import Request, Signals
from llm_distill.teachers.base import Source, Teacher
from llm_distill.teachers.ensemble import EnsembleSource
from llm_distill.teachers.forms import common_form
from llm_distill.teachers.members import (
    Composite,
    as_teachers,
    check_members,
    common_spec,
    opened,
    part_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig

    from llm_distill.rows import Batch
    from llm_distill.signals import Distribution, ModelSpec


@dataclass(frozen=True)
class Routed(Composite):
    """Sends each example to its expert; rows come back in their order.

    Hidden states take experts of one depth and width; their attention is not read. An expert runs
    only on ranks that have an example of it, unless its weights are sharded: then every rank runs
    it on every batch, since each forward is a collective call.

    Attributes:
        experts: Teachers that are not the student itself, by the names that the column gives them;
            an id, a path or a loaded model is a `Local`.
        by: The column of the data with the name of each example's expert; it is kept beside the
            tokens, and never reaches a model.
        turns: Keep experts in the memory of the CPU, each on the device only while it is asked.

    Raises:
        InputError: For less than two experts, or no column.
    """

    experts: Mapping[str, Teacher | PreTrainedModel | str]
    by: str
    turns: bool = False

    def __post_init__(self) -> None:
        """Refuse what routes nowhere."""
        if not isinstance(self.experts, Mapping):
            raise InputError(
                "Routed: experts are teachers by their names; write experts: {code: a/model, …}"
            )
        if not (isinstance(self.by, str) and self.by):
            raise InputError(f"Routed: by is {self.by!r}; write the column that names the experts")
        if len(self.experts) < 2:
            there = ", ".join(map(str, self.experts)) or "none"
            raise InputError(
                f"Routed: experts are {there}; write two or more by the names that the column "
                "gives: experts: {code: a/model, prose: another/model}"
            )
        teachers = as_teachers("Routed", list(self.experts.values()))
        named = dict(zip(map(str, self.experts), teachers, strict=True))
        object.__setattr__(self, "experts", named)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self.experts)

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The experts, as specs."""
        return as_teachers("Routed", list(self.experts.values()))

    def of(self, teachers: Sequence[Teacher]) -> Routed:
        """The same of other experts."""
        return replace(self, experts=dict(zip(self.names, teachers, strict=True)))

    @property
    def config(self) -> PreTrainedConfig:
        """The first expert's."""
        return self.teachers[0].config

    @property
    def spec(self) -> ModelSpec:
        """The first expert's, with the tokens and positions that all have."""
        return common_spec("Routed", [teacher.spec for teacher in self.teachers])

    def find_tokenizer(self) -> Any | None:  # noqa: ANN401  transformers has no common base that types
        """The first one that an expert has; that all are one is checked with the student's."""
        found = (teacher.find_tokenizer() for teacher in self.teachers)
        return next((tokenizer for tokenizer in found if tokenizer is not None), None)

    def check(self, request: Request, device: torch.device) -> None:
        """Refuse what experts do not share, and what an expert refuses.

        Raises:
            InputError: Naming them.
        """
        self.check_together(request)
        for teacher in self.teachers:
            teacher.check(request, device)

    def check_together(self, request: Request) -> None:
        """Refuse what experts do not share, and what cannot take turns.

        Raises:
            InputError: Saying what to write.
        """
        check_members(self, request, self._check, turns=self.turns)

    def form(self) -> str | None:
        """Which few tokens of each row are told, if not all.

        Raises:
            InputError: For experts that tell other ones: their rows are one table.
        """
        return common_form("Routed", self.names, self.teachers)

    def open(self, request: Request, device: torch.device) -> RoutedSource:
        """Open all experts, one after the other.

        Raises:
            ValueError: For attention, or hidden states of experts that differ in depth or width.
        """
        self._check(request)
        sources = [opened(t, request, device, turns=self.turns) for t in self.teachers]
        return RoutedSource(self, sources)

    def check_names(self, values: Iterable[object], where: str) -> None:
        """Refuse names that no expert has.

        Raises:
            InputError: With the first of them.
        """
        for value in values:
            if str(value) not in self.experts:
                raise InputError(
                    f"{where}: column '{self.by}' names {value!r}, and the experts are "
                    f"{', '.join(self.names)}; correct the data, or give that expert"
                )

    def _check(self, request: Request) -> None:
        """Refuse layers that experts do not share.

        Raises:
            ValueError: Naming them.
        """
        specs = [teacher.spec for teacher in self.teachers]
        if request.heads:
            raise ValueError(
                f"{self.spec.name} gives logits and hidden states, and attention of blocks "
                f"{sorted(request.heads)} is asked for; use Logits and HiddenStates with it"
            )
        other = [s for s in specs if (s.depth, s.width) != (specs[0].depth, specs[0].width)]
        if request.hidden and other:
            shapes = [f"{s.name}: {s.depth} blocks of width {s.width}" for s in specs]
            raise ValueError(
                f"{self.spec.name}: hidden states {sorted(request.hidden)} are asked for, and its "
                f"experts have different layers ({', '.join(shapes)}); use Logits, or experts of "
                "one shape"
            )


class RoutedSource:
    """Experts at work.

    Args:
        spec: Which example goes where.
        sources: Of the experts.
    """

    model = None  # the weights are the experts'

    def __init__(self, spec: Routed, sources: Sequence[Source]) -> None:
        self._spec, self._name = spec, f"teacher {spec.spec.name}"
        self.sources = tuple(sources)

    @property
    def told(self) -> tuple[str, ...]:
        """The experts'."""
        return tuple(line for source in self.sources for line in source.told)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing to do: experts are asked about parts of a batch, which are made with it."""

    def __call__(self, batch: Batch) -> Signals:
        """Each expert on its sequences, one after the other."""
        routes = self._routes(batch)
        heard: list[tuple[list[int], Signals]] = []
        for source, sequences in zip(self.sources, routes, strict=True):
            if sequences or collective(source):
                # Whoever has nothing to ask still takes part in the collective call.
                said = source(batch.only(sequences or [0]))
                heard += [(sequences, said)] if sequences else []
        size, length = batch.inputs["input_ids"].shape[:2]
        layers = heard[0][1].states
        return Signals(
            self._name,
            _distribution(heard, batch, self._name),
            {layer: _scattered(heard, layer, size, length) for layer in layers},
        )

    def ask(self, request: Request) -> None:
        """From now on give these signals only, of those it was opened for."""
        for source in self.sources:
            source.ask(request)

    def close(self) -> None:
        """Close all experts."""
        for source in self.sources:
            source.close()

    def _routes(self, batch: Batch) -> list[list[int]]:
        """The sequences of each expert, ascending."""
        size = len(batch.inputs["input_ids"])
        values = batch.columns.get(self._spec.by, ())
        if len(values) != size:
            raise InputError(
                f"{self._name}: a batch of {size} sequences has {len(values)} values of "
                f"'{self._spec.by}'; Routed needs one sequence in each row, with that column"
            )
        self._spec.check_names(values, "a batch")
        return [[k for k, v in enumerate(values) if v == name] for name in self._spec.names]


def routers(teacher: Teacher) -> tuple[Routed, ...]:
    """Every `Routed` among a teacher and what it is made of."""
    inner = teacher.teachers if isinstance(teacher, Composite) else ()
    own = (teacher,) if isinstance(teacher, Routed) else ()
    return (*own, *(router for member in inner for router in routers(member)))


def columns_of(teacher: Teacher) -> tuple[str, ...]:
    """Columns of the data that a teacher reads beside the tokens, each once."""
    return tuple(dict.fromkeys(router.by for router in routers(teacher)))


def collective(source: Source) -> bool:
    """Whether asking is a collective call: weights lie in pieces, its own or a member's."""
    if isinstance(source, RoutedSource | EnsembleSource):
        return any(map(collective, source.sources))
    return in_pieces(source.model)


def _distribution(
    heard: Sequence[tuple[list[int], Signals]], batch: Batch, name: str
) -> Distribution | None:
    """The experts' rows as one distribution, in the order of the batch."""
    if heard[0][1].distribution is None:
        return None
    rows = [(sequences, said) for sequences, said in heard if _places(batch, sequences)]
    heard = rows or heard[:1]  # what was said of no row has no shape of its own
    places = [_places(batch, sequences) for sequences, _ in heard]
    found = [said.logits for _, said in heard]
    tops = [top for top in found if isinstance(top, TopK)]
    if len(tops) == len(found):
        narrowest = min(top.ids.shape[1] for top in tops)  # a server's padding may be put aside
        tops = [top.first(narrowest) for top in tops]
        order = torch.tensor([place for own in places for place in own], dtype=torch.long)
        back = order.argsort().to(tops[0].ids.device)
        columns = zip(*((top.ids, top.log_probs, top.tail) for top in tops), strict=True)
        return TopK(*(torch.cat(column)[back] for column in columns))
    return Switch(tuple(part_of(said, name) for _, said in heard), tuple(map(tuple, places)))


def _places(batch: Batch, sequences: Sequence[int]) -> list[int]:
    """Where the supervised rows of some sequences are among all of them."""
    counts = batch.supervised.per_sequence
    ends = torch.tensor(counts, dtype=torch.long).cumsum(0).tolist()
    kept = (k for k in sequences if k < len(counts))
    return [place for k in kept for place in range(ends[k] - counts[k], ends[k])]


def _scattered(
    heard: Sequence[tuple[list[int], Signals]], layer: int, size: int, length: int
) -> Tensor:
    """Hidden states of all sequences: `[B, T, D]`."""
    found = [said.states[layer] for _, said in heard]
    dtype = reduce(torch.promote_types, (states.dtype for states in found))
    whole = found[0].new_zeros(size, length, found[0].shape[-1], dtype=dtype)
    for (sequences, _), states in zip(heard, found, strict=True):
        whole[torch.tensor(sequences, device=whole.device)] = states.to(dtype)
    return whole
