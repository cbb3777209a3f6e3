"""The layer maps of a recipe before any training: what calibration would decide, and a race."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from peft import get_peft_model
from rich.console import Console
from rich.progress import Progress
from torch import nn

from llm_distill import mapping, race, surveying
from llm_distill.cli.reading import read_data, trainer_inputs
from llm_distill.errors import InputError
from llm_distill.layers import LayerEvidence, auto
from llm_distill.objectives import HiddenStates, Mapped, Objective, named
from llm_distill.preparation import Run, prepare_run
from llm_distill.signals import Request
from llm_distill.students import load_student
from llm_distill.teachers import Source
from llm_distill.trainer import DistillTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, TrainingArguments

    from llm_distill.cli.console import Screen
    from llm_distill.cli.plan import Plan
    from llm_distill.recipe import Recipe
    from llm_distill.rows import Batch
    from llm_distill.signals import Signals


@dataclass(frozen=True)
class Decided:
    """What became of the objectives with layer maps.

    Attributes:
        before: By name, as the recipe has them.
        after: By name, on their maps; one that lost a race is not among them.
        evidence: What was measured.
        told: What a race came to.
    """

    before: dict[str, Mapped]
    after: dict[str, Mapped]
    evidence: LayerEvidence = field(default_factory=LayerEvidence)
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Watched:
    """A teacher whose every answer is counted.

    Attributes:
        source: The teacher.
        tick: Called after each batch.
    """

    source: Source
    tick: Callable[[], object]

    @property
    def model(self) -> PreTrainedModel | None:
        """The teacher's."""
        return self.source.model

    @property
    def told(self) -> tuple[str, ...]:
        """The teacher's."""
        return self.source.told

    def __call__(self, batch: Batch) -> Signals:
        """What the teacher says."""
        signals = self.source(batch)
        self.tick()
        return signals

    def prepare(self, batches: Sequence[Batch]) -> None:
        """As the teacher."""
        self.source.prepare(batches)

    def ask(self, request: Request) -> None:
        """As the teacher."""
        self.source.ask(request)

    def close(self) -> None:
        """As the teacher."""
        self.source.close()


def of_configs(planned: Plan) -> Decided:
    """The maps that follow from the two configs.

    Raises:
        InputError: If data have to decide one.
    """
    before = mapped(planned.objectives)
    waiting = [name for name, objective in before.items() if objective.undecided]
    if waiting:
        raise InputError(
            f"--no-data: the layer map of {', '.join(waiting)} is decided by data; leave --no-data "
            "out, or write layers: uniform"
        )
    specs = planned.student, planned.teacher
    after = {name: o.with_map(o.mapping(*specs)) for name, o in before.items()}
    return Decided(before, after)


def of_data(recipe: Recipe, args: TrainingArguments, planned: Plan, screen: Screen) -> Decided:
    """The maps as calibration decides them, and a race where the recipe asks for one.

    Similarities of the teacher's layers are measured in any case.

    Raises:
        InputError: For anything that cannot work.
    """
    prepared = read_data(recipe, args, planned, screen)
    try:
        run = prepare_run(
            recipe.student,
            recipe.teacher,
            recipe.objectives,
            args,
            trainer_inputs(planned, prepared),
            adapter=recipe.adapter(causal=planned.causal),
        )
        return _decided(run, recipe, args)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def mapped(objectives: Sequence[Objective]) -> dict[str, Mapped]:
    """The objectives with layer maps by their names.

    Raises:
        InputError: If there is none.
    """
    everything = named(objectives)
    several = [name for name, o in everything.items() if mapping.member_of(o) is not None]
    if several:
        raise InputError(
            f"{several[0]} maps layers of one of several teachers, and this command draws those of "
            "one; write that member as the teacher, and leave member out"
        )
    found = {name: o for name, o in everything.items() if isinstance(o, Mapped)}
    if not found:
        raise InputError(
            f"no objective here has a layer map ({', '.join(everything)}); write one below "
            "objectives, such as `- HiddenStates: {layers: auto}`"
        )
    return found


def _decided(run: Run, recipe: Recipe, args: TrainingArguments) -> Decided:
    """Measure, decide, race."""
    race.check(run, args, recipe.balance)
    specs = run.student, run.teacher.spec
    asked = mapping.undecided(run.objectives)
    every = Request(hidden=frozenset(range(specs[1].depth + 1)))
    needed = run.opening_request | Request(logits=True) if "race" in asked else Request()
    source = run.teacher.open(every | needed, args.device)
    # Nobody looks at the student's weights where only teacher layers are compared.
    student = _student(recipe, run) if asked & {"cross", "race"} else nn.Module()
    student.to(args.device)
    evidence = _measured(run, student, source, args)
    settled = mapping.settled(run.objectives, *specs, evidence)
    # As `run` makes its trainer, so that it finds the race that was run here.
    make = partial(DistillTrainer, rows_per_chunk=recipe.rows_per_chunk, balance=recipe.balance)
    raced = replace(run, objectives=settled)
    objectives, told = race.decided(raced, student, source, args, evidence, make)
    source.close()
    after = {
        name: o.with_map(o.mapping(*specs))
        for name, o in _kept(run.objectives, objectives).items()
        if isinstance(o, Mapped)
    }
    return Decided(mapped(run.objectives), after, evidence, (*run.told, *told))


def _measured(
    run: Run, student: nn.Module, source: Source, args: TrainingArguments
) -> LayerEvidence:
    """Similarities, those of the teacher's layers among them, with a bar."""
    asking = replace(run, objectives=(*run.objectives, HiddenStates(layers=auto)))
    shown = args.process_index == 0 and not args.disable_tqdm
    with _bar("comparing layers", surveying.SETS, shown=shown) as tick:
        return surveying.survey(asking, student, Watched(source, tick), args)


@contextmanager
def _bar(what: str, total: int, *, shown: bool) -> Iterator[Callable[[], object]]:
    """A bar on the standard error that is gone afterwards."""
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bar:
        yield partial(bar.advance, bar.add_task(what, total=total))


def _student(recipe: Recipe, run: Run) -> nn.Module:
    """The student as `run` would train it."""
    student, adapter = load_student(recipe.student, run.teacher), recipe.adapter(causal=run.shift)
    return cast("nn.Module", student if adapter is None else get_peft_model(student, adapter))


def _kept(before: Sequence[Objective], after: Sequence[Objective]) -> dict[str, Objective]:
    """The objectives after a race by the names they had before; those that raced may be gone."""
    names: list[Any] = [
        name
        for name, objective in named(before).items()
        if len(after) == len(before)
        or not (isinstance(objective, Mapped) and "race" in objective.undecided)
    ]
    return dict(zip(names, after, strict=True))
