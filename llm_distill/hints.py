"""Objectives on layers, taught by a cache: which states it has to hold, and the maps it decided.

A strategy such as `auto` looks at the teacher, which a training from a cache does not have. So
`llm-distill cache` decides the map, writes the states of its layers, and the map beside them; a
training takes it from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from llm_distill import binding, recall
from llm_distill.cache.lookup import Lookup
from llm_distill.errors import InputError
from llm_distill.layers import LayerMap, looks
from llm_distill.layers.map import Row
from llm_distill.losses.described import describe_function
from llm_distill.objectives import AttentionMaps, Mapped, Objective, Relations, Term, named
from llm_distill.signals import Request
from llm_distill.teachers import Cached, leaves
from llm_distill.teachers.members import Composite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.rows import RowKind
    from llm_distill.signals import ModelSpec
    from llm_distill.teachers import Teacher


def lookup_of(teacher: object, asked: Request) -> Lookup | None:
    """Reads a cache where batches are collated, in the DataLoader's processes; None for others."""
    if not isinstance(teacher, Cached) or asked == Request():
        return None
    return Lookup(teacher.path, asked.logits, tuple(sorted(asked.hidden)))


def ready(
    objectives: Sequence[Objective], student: ModelSpec, teacher: Teacher
) -> tuple[Objective, ...]:
    """The objectives with what follows from the two configs, or from what a cache decided.

    Raises:
        InputError: If they are no objectives, or a map does not fit or was not decided.
    """
    return settled(teacher, binding.ready(objectives, student, teacher.spec), student)


def check(
    teacher: Teacher,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    student: ModelSpec,
) -> None:
    """Refuse objectives that a cache cannot serve; any other teacher may pass.

    Raises:
        InputError: Naming the objective or the signal, and what to write.
    """
    recall.check(teacher, objectives, terms, student)
    check_rows(teacher, terms)


def settled(
    teacher: Teacher, objectives: Sequence[Objective], student: ModelSpec
) -> tuple[Objective, ...]:
    """The objectives with the maps that a cache decided when it was written.

    Args:
        teacher: Any; only a cache, and a teacher with one among its members, is looked at.
        objectives: With what follows from the two configs.
        student: Of the run.

    Raises:
        InputError: For a map that the cache did not decide, or for another student.
    """
    if isinstance(teacher, Cached) and teacher.store.manifest.layers is None:
        return tuple(objectives)  # its objectives on layers are refused, whatever their maps
    decided: Mapping[str, Mapping[str, Any]] = {}
    owner = "a cache among several teachers"
    if isinstance(teacher, Cached):
        decided, owner = teacher.store.manifest.maps, f"the cache {teacher.path}"
    found: list[Objective] = []
    for name, objective in named(objectives).items():
        if isinstance(objective, AttentionMaps | Relations) or not isinstance(objective, Mapped):
            found.append(objective)  # attention of a cache is refused, whatever the map
        elif _of_cache(teacher, objective.member):
            refuse_lookers([objective])
            found.append(with_map(name, objective, decided, student, owner))
        else:
            found.append(objective)
    return tuple(found)


def with_map(
    name: str,
    objective: Mapped,
    decided: Mapping[str, Mapping[str, Any]],
    student: ModelSpec,
    owner: str,
) -> Mapped:
    """An objective on its decided map; one whose map needs no teacher stays as it is.

    Args:
        name: Of the objective.
        objective: Its map may wait for the teacher.
        decided: Maps, as a manifest has them.
        student: Its depth has to be that of the map.
        owner: Of the maps, for messages.

    Raises:
        InputError: Naming the objective, and what to write.
    """
    if not objective.undecided:
        return objective
    told, asked = decided.get(name), describe_function(objective.layers)
    if told is None or told["strategy"] != asked:
        there = f"decided {told['strategy']} for it" if told else "decided no map for it"
        raise InputError(
            f"{name}: layers: {asked} looks at the teacher, and {owner} {there}; run llm-distill "
            "cache on this recipe, or write a map: layers: uniform, or {explicit: …}"
        )
    layer_map = read_map(told["map"])
    if layer_map.student_depth != student.depth:
        raise InputError(
            f"{name}: {owner} decided its map for a student of {layer_map.student_depth} blocks, "
            f"and {student.name} has {student.depth}; run llm-distill cache on this recipe with "
            "another path"
        )
    return objective.with_map(layer_map)


def decisions(before: Sequence[Objective], after: Sequence[Objective]) -> dict[str, dict[str, Any]]:
    """The maps that were decided, as a manifest has them."""
    found = {}
    for (name, asked), made in zip(named(before).items(), after, strict=True):
        if isinstance(asked, Mapped) and isinstance(made, Mapped) and asked.undecided:
            layer_map = made.layers
            if isinstance(layer_map, LayerMap):
                strategy = describe_function(asked.layers)
                text = json.loads(json.dumps(asdict(layer_map)))  # tuples are lists
                found[name] = {"strategy": strategy, "map": text}
    return found


def read_map(text: Mapping[str, Any]) -> LayerMap:
    """A map from a manifest, where tuples are lists."""
    rows = tuple(
        Row(row["student"], tuple((layer, share) for layer, share in row["teacher"]), row["weight"])
        for row in text["rows"]
    )
    evidence = tuple((what, figure) for what, figure in text["evidence"])
    return LayerMap(**{**text, "rows": rows, "evidence": evidence})


def refuse_lookers(objectives: Sequence[Objective]) -> None:
    """Refuse maps that need a teacher at work while the student is trained.

    Raises:
        InputError: Naming the objective, and what to write.
    """
    for name, objective in named(objectives).items():
        if not isinstance(objective, Mapped):
            continue
        if "race" in objective.undecided:
            raise InputError(
                f"{name}: auto_race trains copies of the student on the teacher, and a cache "
                "(Cached) is none; run llm-distill map with the teacher itself, and write the map "
                "that won: layers: {saved: {path: …}}"
            )
        if looks(objective.layers):
            raise InputError(
                f"{name}: refresh looks at the teacher's layers while the student is trained, and "
                "a cache (Cached) holds those of one map; write refresh: 0"
            )


def layers_of(
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    specs: tuple[ModelSpec, ModelSpec],
) -> frozenset[int]:
    """The teacher's layers whose states a training on these objectives reads."""
    asked = binding.teacher_request(terms) | binding.survey(objectives, *specs)[1]
    return asked.hidden


def rows_of(terms: Mapping[str, Term]) -> RowKind:
    """Of which tokens states are read: those that predict something, or all."""
    every = any(_reads_all(term) for term in terms.values() if term.teacher.hidden)
    return "valid" if every else "supervised"


def keeps_valid(teacher: Teacher) -> bool:
    """Whether a cache holds states of all real tokens, which are found by the batch's `valid`."""
    return any(
        leaf.store.manifest.layers is not None and leaf.store.manifest.layers.rows == "valid"
        for leaf in leaves(teacher)
        if isinstance(leaf, Cached)
    )


def check_rows(teacher: Teacher, terms: Mapping[str, Term]) -> None:
    """Refuse terms that read all tokens of a cache that holds supervised ones.

    Raises:
        InputError: Naming the term.
    """
    for name, term in terms.items():
        if not (term.teacher.hidden and _reads_all(term)):
            continue
        for leaf in leaves(_read(teacher, term.member)):
            kept = leaf.store.manifest.layers if isinstance(leaf, Cached) else None
            if isinstance(leaf, Cached) and kept is not None and kept.rows == "supervised":
                raise InputError(
                    f"{name}: the cache {leaf.path} holds {kept}, and all valid tokens are asked "
                    "for; write rows: supervised, or run llm-distill cache on this recipe with "
                    "another path"
                )


def check_asked(
    cached: Cached,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    teacher: ModelSpec,
) -> None:
    """Refuse, before it is written, a cache of states that nobody reads or that cannot serve.

    Raises:
        InputError: Saying what to write.
    """
    if not cached.states:
        return
    refuse_lookers(objectives)
    if not any(term.teacher.hidden for term in terms.values()):
        raise InputError(
            f"Cached: states is true, and no objective ({', '.join(terms)}) reads hidden states; "
            "leave it out, or add HiddenStates"
        )
    width = cached.states_width
    if width is not None and width >= teacher.width:
        raise InputError(
            f"Cached: states_width is {width}, and the states of {teacher.name} have "
            f"{teacher.width} features; write less, or leave it out to keep them all"
        )


def _of_cache(teacher: Teacher, member: int | None) -> bool:
    """Whether the layers of a teacher, or of one of several, are those of a cache."""
    return any(isinstance(leaf, Cached) for leaf in leaves(_read(teacher, member)))


def _read(teacher: Teacher, member: int | None) -> Teacher:
    """The one of several teachers whose layers are read."""
    several = isinstance(teacher, Composite) and member is not None
    return cast("Composite", teacher).teachers[cast("int", member)] if several else teacher


def _reads_all(term: Term) -> bool:
    """Whether a term reads states of all real tokens; blocks that learn alone begin with them."""
    return term.rows == "valid" or term.alone(0.0)
