"""Layer maps that a teacher has to be seen for, decided while it is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from llm_distill import hints, mapping, surveying
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest
from llm_distill.errors import InputError
from llm_distill.objectives import Mapped, named
from llm_distill.students import load_student

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_distill.caching.plan import Capture
    from llm_distill.teachers import Source


def decided(capture: Capture, source: Source, *, anew: bool = False) -> Capture:
    """The same, with the maps that its objectives leave to the teacher.

    Those of a cache that was begun for the same strategies are taken as they are, so that writing
    goes on with its layers.

    Args:
        capture: Objectives that no map is left to stay as they are.
        source: The teacher.
        anew: Whether a cache that is there does not count.

    Raises:
        InputError: For data that a strategy cannot work with.
    """
    run = capture.run
    if not capture.cached.states or not mapping.undecided(run.objectives):
        return capture
    there = {} if anew else _there(capture)
    waiting = {k: o for k, o in named(run.objectives).items() if isinstance(o, Mapped)}
    try:
        owner = f"the cache {capture.cached.path}"
        made = {k: hints.with_map(k, o, there, run.student, owner) for k, o in waiting.items()}
        objectives = [made.get(k, o) for k, o in named(run.objectives).items()]
    except InputError:  # of other strategies, or none: a new look
        student = nn.Module()  # nobody looks at it where teacher layers are compared
        if "cross" in mapping.undecided(run.objectives):
            student = load_student(run.model, run.teacher)
        evidence = surveying.survey(run, student, source, capture.args)
        specs = run.student, run.teacher.spec
        objectives = list(mapping.settled(run.objectives, *specs, evidence))
    return capture.on_maps(objectives, hints.decisions(run.objectives, objectives))


def _there(capture: Capture) -> Mapping[str, Mapping[str, Any]]:
    """The maps of a cache that is there, finished or not."""
    for name in (FILE, UNFINISHED):
        if (capture.folder / name).is_file():
            return Manifest.read(capture.folder / name).maps
    return {}
