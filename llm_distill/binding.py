"""From specs to terms: what the objectives ask of both models, before weights load."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llm_distill import mapping, schedules
from llm_distill.errors import InputError
from llm_distill.objectives import (
    Evidence,
    HeadTerm,
    Objective,
    QueryPlan,
    Term,
    check_objectives,
    named,
)
from llm_distill.queries import sample_queries
from llm_distill.rows import Batch, Draw
from llm_distill.signals import ModelSpec, Request
from llm_distill.teachers import DeepToShallow, Itself

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.teachers import Teacher

BESIDE = (
    "rows",
    "valid",
    "keys",
    "theirs",
    "examples",
    "told",
    "stored",
    "columns",
    "labels",
    "num_items_in_batch",
)
"""What stands in a collated batch and is no input of a model."""


def bind(
    objectives: Sequence[Objective],
    student: ModelSpec,
    teacher: ModelSpec,
    *,
    seed: int,
    evidence: Evidence | None = None,
) -> dict[str, Term]:
    """Every objective as a term, under its name in the log.

    Trained parts are drawn from `seed`, whatever ran before, so that all ranks have the same.

    Raises:
        InputError: If an objective does not fit the two models; two plans of sampled queries.
    """
    try:
        check_objectives(objectives)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            terms = {
                name: _term(o, student, teacher, evidence) for name, o in named(objectives).items()
            }
    except ValueError as error:
        raise InputError(str(error)) from error
    query_plan(terms)
    return terms


def _term(
    objective: Objective, student: ModelSpec, teacher: ModelSpec, evidence: Evidence | None
) -> Term:
    """An objective as a term, on the member of several teachers that it names."""
    member = mapping.member_of(objective)
    seen = None if evidence is None else evidence.member(member)
    term = objective.build(student, teacher.member(member), seen)
    term.member = member
    return term


def ready(
    objectives: Sequence[Objective], student: ModelSpec, teacher: ModelSpec
) -> tuple[Objective, ...]:
    """The objectives with what follows from the two configs: rows, maps, and hints that fade.

    Raises:
        InputError: If they are no objectives, or a map does not fit the two models.
    """
    try:
        check_objectives(objectives)
    except ValueError as error:
        raise InputError(str(error)) from error
    mapping.check_members(objectives, teacher)
    known = mapping.known(mapping.with_rows(objectives, student), student, teacher)
    return mapping.fading(known, student)


def check_itself(
    teacher: Teacher, objectives: Sequence[Objective], terms: Mapping[str, Term]
) -> None:
    """Refuse what a teacher that is the student itself has no use for; others pass.

    Raises:
        InputError: For a race of maps, or a layer that would learn from itself.
    """
    if not isinstance(teacher, Itself):
        return
    if "race" in mapping.undecided(objectives):
        raise InputError(
            f"auto_race trains copies of the student, and {teacher.spec.name} is made of one "
            "student; write layers: uniform, or another strategy"
        )
    if isinstance(teacher, DeepToShallow):
        _check_depth(terms)


def _check_depth(terms: Mapping[str, Term]) -> None:
    """Refuse what a layer of the student would learn from itself, or from a layer below it.

    Raises:
        InputError: Naming the term, and what to write.
    """
    for name, term in terms.items():
        found = term.mapping
        rows, depth = ((), 0) if found is None else (found.rows, found.teacher_depth)
        for row in rows:
            if any(layer <= row.student for layer, _ in row.teacher):
                below = min(row.student, depth - 1)
                raise InputError(
                    f"{name}: layer {row.student} of the student would learn from its own layer "
                    f"{min(row.layers)}, and DeepToShallow teaches from deeper ones; write "
                    f"layers: {{explicit: {{pairs: [[{below}, {below + 1}]]}}}}, or deeper"
                )
        if isinstance(term, HeadTerm) and term.teacher.logits and term.exit is None:
            raise InputError(
                f"{name}: the last layer would learn from itself; with DeepToShallow write exit: 1 "
                "or another layer of the student"
            )


def check_optimizers(terms: Mapping[str, Term], optimizers: tuple[Any, Any]) -> None:
    """Refuse an optimizer that was made before the projectors it would have to train.

    Raises:
        InputError: Naming the terms with something to train.
    """
    trained = [name for name, term in terms.items() if any(True for _ in term.parameters())]
    if optimizers[0] is not None and trained:
        raise InputError(
            f"optimizers: {', '.join(trained)} would not be trained, whose projectors this "
            "optimizer does not know; give optimizer_cls_and_kwargs=(AdamW, {'lr': 1e-4}) instead"
        )


def checked_rows(rows: int | None) -> int | None:
    """Rows per chunk as they were asked for.

    Raises:
        InputError: For less than one.
    """
    number = isinstance(rows, int) and not isinstance(rows, bool)
    if rows is not None and not (number and rows >= 1):
        raise InputError(
            f"rows_per_chunk: {rows!r}; write a number of rows from 1 on (256), or leave it out"
        )
    return rows


def survey(
    objectives: Sequence[Objective], student: ModelSpec, teacher: ModelSpec
) -> tuple[Request, Request]:
    """The signals of both models that have to be seen once before binding; empty for most runs."""
    ours, theirs = Request(), Request()
    for objective in objectives:
        member = mapping.member_of(objective)
        of_student, of_teacher = objective.survey(student, teacher.member(member))
        ours, theirs = ours | of_student, theirs | of_teacher.within(member)
    return ours, theirs


def query_plan(terms: Mapping[str, Term]) -> QueryPlan | None:
    """The one plan of sampled query rows that all terms share; None where no term reads maps.

    Raises:
        InputError: For two plans, naming both terms.
    """
    plans = {name: term.queries for name, term in terms.items() if term.queries is not None}
    if len(set(plans.values())) > 1:
        (first, a), (second, b) = list(plans.items())[:2]
        raise InputError(
            f"{first} and {second} ask for different query rows ({a.most} {a.rows}, {b.most} "
            f"{b.rows}); one run samples "
            "once: write the same `queries` and `rows` in both"
        )
    return next(iter(plans.values()), None)


def make_batch(
    collated: Mapping[str, Any],
    plan: QueryPlan | None,
    *,
    seed: int,
    epoch: int,
    keep: int | None = None,
) -> Batch:
    """What `RowCollator` made, as models and terms see it.

    Args:
        collated: Model inputs with what `RowCollator` puts beside them.
        plan: Which query rows to sample; None for none.
        seed: Of the run.
        epoch: Of the queries.
        keep: Only the rows of the first sequences count: the rest repeats others, to even out the
            ranks.
    """
    rows, valid, keys = collated["rows"], collated["valid"], collated["keys"]
    if keep is not None:
        rows = rows.first(keep)
        valid = None if valid is None else valid.first(keep)
    queries, examples, told = None, collated.get("examples"), collated.get("told")
    if plan is not None:
        among = rows if plan.rows == "supervised" else valid
        missing = len(keys) - len(among.per_sequence)
        among = replace(among, per_sequence=(*among.per_sequence, *[0] * missing))
        queries = sample_queries(among, keys, most=plan.most, seed=seed, epoch=epoch)
    inputs = {k: v for k, v in collated.items() if k not in BESIDE}
    theirs = None
    if "theirs" in collated:
        theirs = make_batch(collated["theirs"], None, seed=seed, epoch=epoch, keep=keep)
    if examples is not None and keep is not None:
        examples = examples.first(keep)
    if told is not None and keep is not None:
        own = slice(len(rows))
        told = told[own] if isinstance(told, torch.Tensor) else told.rows(own)
    draw = Draw(seed, epoch, tuple(keys))
    beside = collated.get("columns", {}), collated.get("stored")
    batch = Batch(inputs, rows, valid, queries, draw, theirs, examples, told, *beside)
    return batch.to(rows.index.device)


def needs_valid(terms: Mapping[str, Term]) -> bool:
    """Whether any term counts all real tokens."""
    return any(term.rows == "valid" for term in terms.values())


def teacher_request(terms: Mapping[str, Term]) -> Request:
    """What the teacher has to give."""
    request = Request()
    for term in terms.values():
        request = request | term.teacher.within(term.member)
    return request


def opening_request(
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    specs: tuple[ModelSpec, ModelSpec],
    *,
    compared: bool,
) -> Request:
    """What the teacher may be asked for: in the training, and before it by what data decide.

    Args:
        objectives: What to match.
        terms: The same, bound.
        specs: Of student and teacher.
        compared: Whether an evaluation compares the logits of the two.
    """
    logits = Request(logits=compared)
    mapped, surveyed = mapping.requests(objectives, *specs)[1], survey(objectives, *specs)[1]
    return teacher_request(terms) | logits | mapped | surveyed


def reads_logits(terms: Mapping[str, Term]) -> bool:
    """Whether any term reads the student's logits."""
    return any(term.student.logits or term.student.exits for term in terms.values())


def describe(objectives: Sequence[Objective], terms: Mapping[str, Term]) -> str:
    """Objectives, weights and layer maps, as printed before training."""
    lines: list[str] = []
    for (name, objective), term in zip(named(objectives).items(), terms.values(), strict=True):
        settings = objective.describe()
        lines.append(
            f"{name}: weight {schedules.describe(objective.weight)}"
            + (f" · {settings}" if settings else "")
        )
        lines += [f"  of member {term.member}"] if term.member is not None else []
        lines += [f"  {note}" for note in term.notes]
        trained = sum(p.numel() for p in term.parameters())
        if trained:
            lines.append(f"  {trained:,} trained parameters, not part of the exported student")
    return "\n".join(lines)
