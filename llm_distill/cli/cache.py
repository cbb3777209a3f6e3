"""`llm-distill cache`: the teacher of a recipe runs once, and what it says is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_distill import hints, mapping, recall
from llm_distill.caching import (
    Capture,
    check_beside,
    check_folder,
    check_place,
    write_cache,
)
from llm_distill.cli.plan import plan
from llm_distill.cli.reading import open_screen, read_data, trainer_inputs
from llm_distill.errors import InputError, each_by_itself
from llm_distill.layers import LayerEvidence
from llm_distill.preparation import prepare_run
from llm_distill.students import teacher_for
from llm_distill.teachers import Cached, Local

if TYPE_CHECKING:
    from llm_distill.cache.manifest import Manifest
    from llm_distill.recipe import Recipe


def cache(recipe: Recipe, *, overwrite: bool = False) -> Manifest:
    """Write the cache that a recipe trains from.

    Args:
        recipe: Its teacher is a `Cached` that says of which teacher.
        overwrite: Whether another cache that is there may be lost.

    Returns:
        What was written.

    Raises:
        InputError: For anything that cannot work, before weights load.
    """
    cached, teacher = _named(recipe)
    _check_path(recipe, cached, teacher, overwrite=overwrite)
    teacher_for(recipe.student, cached)  # a run has no weights to make a student of
    asked = replace(recipe, teacher=teacher)
    args = recipe.arguments()
    screen = open_screen(args)
    planned = plan(asked, args)
    held = range(planned.teacher.depth + 1) if cached.states else ()
    specs = planned.student, planned.teacher
    recall.check_objectives(cached.estimator, planned.objectives, planned.terms, *specs, held)
    hints.check_asked(cached, planned.objectives, planned.terms, planned.teacher)
    prepared = read_data(asked, args, planned, screen)
    try:
        run = prepare_run(
            asked.student,
            asked.teacher,
            asked.objectives,
            args,
            trainer_inputs(planned, prepared),
            adapter=asked.adapter(causal=planned.causal),
        )
        capture = Capture(run, cached, args)
        for line in expected(capture):
            screen.say(line)
        with each_by_itself():
            written = write_cache(capture, overwrite=overwrite)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    args.distributed_state.wait_for_everyone()
    args.distributed_state.destroy_process_group()
    screen.say(f"Cache: {written}")
    for name, told in written.maps.items():
        screen.layer_map(name, hints.read_map(told["map"]), LayerEvidence())
    screen.figures(figures(written), title="what was written")
    screen.say(f"It is in {cached.path}; llm-distill run with the same recipe trains from it")
    return written


def _named(recipe: Recipe) -> tuple[Cached, Local]:
    """The cache of a recipe, and the teacher that is to be asked for it.

    Raises:
        InputError: If the recipe does not name both.
    """
    cached = recipe.teacher
    if not isinstance(cached, Cached):
        raise InputError(
            f"teacher: {type(cached).__name__} is not cached; write teacher: {{Cached: {{path: "
            "cache/name, of: the teacher's id or path}}}}"
        )
    if not isinstance(cached.of, Local):
        raise InputError(
            f"teacher: the cache {cached.path} does not say of which teacher; write teacher: "
            f"{{Cached: {{path: {cached.path}, of: the teacher's id or path}}}}"
        )
    return cached, cached.of


def _check_path(recipe: Recipe, cached: Cached, teacher: Local, *, overwrite: bool) -> None:
    """Refuse a path that is no folder of its own.

    Raises:
        InputError: Saying what is there.
    """
    data, student = recipe.data, recipe.student
    given: dict[str, object] = {
        "the teacher": teacher.model,
        "the teacher's tokenizer": teacher.tokenizer,
        "the data": data.path,
        "the evaluation data": data.eval,
        "the chat template": data.chat_template,
    }
    if isinstance(student, Local):
        given |= {"the student": student.model, "the student's tokenizer": student.tokenizer}
    taken = {what: path for what, path in given.items() if isinstance(path, str)}
    check_place(cached.path, taken)
    if data.path is not None and Path(data.path).expanduser().is_dir():
        check_beside(cached.path, "the folder of the data", data.path)
    check_beside(cached.path, "training.output_dir", recipe.training["output_dir"])
    check_folder(Path(cached.path), overwrite=overwrite)


def expected(capture: Capture) -> tuple[str, ...]:
    """What a cache with hidden states will take, which is much: nothing of others."""
    layers = capture.layers
    if layers is None:
        return ()
    total = sum(capture.bytes(part) for part in capture.parts)
    rows = sum(capture.rows(part) for part in capture.parts)
    waits = " (how many, the map decides)" if mapping.undecided(capture.run.objectives) else ""
    return (
        f"Keeping {capture.estimator}, up to {capture.row_bytes:,.0f} bytes a supervised token, "
        f"and {layers}{waits}, {layers.token_bytes:,.0f} bytes a token: up to {total / 1e6:,.1f} "
        f"MB for {rows:,} supervised tokens",
    )


def figures(written: Manifest) -> dict[str, float]:
    """What the table tells of a cache."""
    told = written.fidelity
    lost = {
        f"lost of hidden state {layer}, of its distance from the median": each["mean"]
        for layer, each in written.lost.items()
    }
    measured = {
        "KL that quantising the teacher adds, nats per token": told.get("quantised_kl"),
        "agreement of the quantised teacher with the whole": told.get("quantised_agreement"),
    }
    return lost | {
        "bytes per supervised token": written.bytes / max(written.rows, 1),
        "KL of what is read to what is kept, nats per token": told["kl"],
        "KL of what is read to what is kept, the largest": told["worst"],
        "probability of the kept tokens": told["mass"],
        "entropy of the teacher, nats per token": told["entropy"],
        "negative log-likelihood of the labels under the teacher, nats": told["nll"],
        **{name: figure for name, figure in measured.items() if figure is not None},
    }
