"""From a prepared run to a finished cache, on any number of ranks."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llm_distill import added_kl, hints, loading
from llm_distill.cache import estimators, fingerprints, frames
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest
from llm_distill.cache.store import TEACHER, save_head
from llm_distill.caching import folder
from llm_distill.caching.asking import write_shard
from llm_distill.caching.deciding import decided
from llm_distill.caching.finishing import finish
from llm_distill.caching.framing import framed
from llm_distill.caching.room import check_disk
from llm_distill.capture import plain
from llm_distill.errors import InputError
from llm_distill.lm_head import head_of
from llm_distill.pieces import in_pieces
from llm_distill.publishing import versions
from llm_distill.signals import Request
from llm_distill.students import Made, as_local
from llm_distill.teachers import Local

if TYPE_CHECKING:
    from llm_distill.caching.plan import Capture
    from llm_distill.signals import Head
    from llm_distill.teachers import Source, Teacher


def write_cache(capture: Capture, *, overwrite: bool = False) -> Manifest:
    """Ask the teacher everything, and write it down; go on where an earlier run stopped.

    Args:
        capture: What to write.
        overwrite: Whether a cache that is there may be lost.

    Returns:
        The manifest, on every rank.

    Raises:
        InputError: If something does not fit, the disk is too small, or the folder holds another
            cache.
    """
    capture.estimator.check(capture.vocabulary)
    run = capture.run
    hints.check_asked(capture.cached, run.objectives, run.terms, run.teacher.spec)
    if run.tokenizers.theirs is not None:
        raise InputError(
            f"{run.tokenizers.difference}; a cache is read token by token, which needs one "
            "vocabulary"
        )
    folder.check_place(capture.folder, _models(capture))
    if folder.check_folder(capture.folder, overwrite=overwrite):
        return _write(capture, done=True, overwrite=False)
    check_disk(capture)
    with folder.alone(capture.folder, capture.args):
        return _write(capture, done=False, overwrite=overwrite)


def _models(capture: Capture) -> dict[str, str]:
    """Where the teacher and the student may lie."""
    teacher, student = capture.run.teacher, capture.run.model
    found = {"the teacher": teacher.name} if isinstance(teacher, Local) else {}
    if not isinstance(student, Made):
        found["the student"] = as_local(student).name
    return found


def _write(capture: Capture, *, done: bool, overwrite: bool) -> Manifest:
    """Open the teacher, and write what is missing.

    Args:
        capture: What to write.
        done: Whether there is a whole cache, which has to be of this teacher.
        overwrite: Whether a cache that is there may be lost.
    """
    run = capture.run
    wanted = run.opening_request.hidden if capture.cached.states else frozenset[int]()
    opens = partial(run.teacher.open, Request(logits=True, hidden=wanted), capture.args.device)
    source, added = added_kl.opened(opens, run, capture.args, compared=not done)
    try:
        _refuse_sharded(source)
        capture = decided(capture, source, anew=overwrite)
        if not done:
            check_disk(capture)  # again, now that the layers are known
        layers = () if capture.layers is None else capture.layers.layers
        source.ask(Request(logits=True, hidden=frozenset(layers)))
        begun = replace(_begun(capture, source), fidelity=added_kl.figures(added))
        there = _there(capture, begun, overwrite=overwrite)
        if there is not None and (capture.folder / FILE).is_file():
            return there
        if done:
            raise InputError(
                f"the cache in {capture.folder} was there and is no more: another process deleted "
                "it; run the same command again"
            )
        folder.together(capture.args)  # all have looked before the first one writes
        if capture.args.process_index == 0 and there is None:
            _prepare_folder(capture, begun, source)
        folder.together(capture.args)
        _write_shards(capture, source)
    finally:
        source.close()
    folder.together(capture.args)
    if capture.args.process_index == 0:
        finish(capture, begun)
    folder.together(capture.args)
    return Manifest.read(capture.folder / FILE)


def _refuse_sharded(source: Source) -> None:
    """Refuse a teacher in shards: its processes run together, and those that write a cache do not.

    Raises:
        InputError: Saying how else.
    """
    if in_pieces(source.model):
        raise InputError(
            "the teacher is sharded over processes, which have to run together, and each process "
            "of llm-distill cache asks it about other examples; start one process, and spread the "
            "teacher over its GPUs: of: {Local: {model: …, device_map: auto}}"
        )


def _begun(capture: Capture, source: Source) -> Manifest:
    """The manifest before there are shards."""
    run, tokenizer, model = capture.run, capture.run.kwargs["processing_class"], source.model
    spec, name = run.teacher.spec, loading.shown(run.teacher.spec.name)
    return Manifest(
        teacher=name,
        revision=getattr(run.teacher.config, "_commit_hash", None),
        weights="" if model is None else fingerprints.of_weights(model),
        files=_files(run.teacher),
        dtype="" if model is None else str(model.dtype).removeprefix("torch."),
        quantised=getattr(run.teacher, "quantize", None),
        spec=asdict(replace(spec, name=name, vocabulary=capture.vocabulary, blocks=None)),
        tokenizer="" if tokenizer is None else fingerprints.of_tokenizer(tokenizer),
        template="" if tokenizer is None else fingerprints.of_template(tokenizer),
        keep=estimators.written(capture.estimator),
        states=None if capture.layers is None else capture.layers.written(),
        maps=capture.maps,
        shift=run.shift,
        vocabulary=capture.vocabulary,
        data=capture.data(),
        versions=versions(),
    )


def _files(teacher: Teacher) -> dict[str, str]:
    """Fingerprints of the files of a teacher; none of a model that was given."""
    if not isinstance(teacher, Local) or not isinstance(teacher.model, str):
        return {}
    commit = getattr(teacher.config, "_commit_hash", None)
    folder = loading.folder_of(teacher.model, commit or teacher.revision)
    return {} if folder is None else fingerprints.of_folder(folder)


def _there(capture: Capture, begun: Manifest, *, overwrite: bool) -> Manifest | None:
    """The manifest of what the folder holds; None to start anew.

    Raises:
        InputError: If it is of something else, and may not be lost.
    """
    if overwrite:
        return None
    for name, words in ((FILE, "a finished cache"), (UNFINISHED, "the beginning of a cache")):
        path = capture.folder / name
        if not path.is_file():
            continue
        there = Manifest.read(path)
        differ = there.differences(begun)
        if differ:
            raise InputError(
                f"{capture.folder} holds {words} that differs in {', '.join(differ)}; write "
                "another path, or --overwrite to lose it"
            )
        return there
    return None


def _prepare_folder(capture: Capture, begun: Manifest, source: Source) -> None:
    """An empty cache: what is needed besides shards."""
    there = capture.folder
    head = _head_to_keep(source) if capture.estimator.example() is None else None
    folder.clear(there)
    config = copy.deepcopy(capture.run.teacher.config)
    if not config.architectures and source.model is not None:
        config.architectures = [type(plain(source.model)).__name__]
    config.save_pretrained(there / TEACHER)
    tokenizer = capture.run.kwargs["processing_class"]
    if tokenizer is not None:
        tokenizer.save_pretrained(there / TEACHER)
    if head is not None:
        begun = replace(begun, head=save_head(there, head))
    if capture.layers is not None:
        frames.save(framed(capture, source), there)
        begun = replace(begun, frames=fingerprints.of_file(there / frames.FILE))
    begun.write(there / UNFINISHED)


def _head_to_keep(source: Source) -> Head:
    """The teacher's head, whole.

    Raises:
        InputError: If it is not in the memory of this process.
    """
    head = None if source.model is None else head_of(plain(source.model))
    if head is None or head.weight.is_meta:
        raise InputError(
            "keep: hidden writes the teacher's head, which is not in memory here; write keep: "
            "topk, or a device_map that leaves the head on the CPU"
        )
    return head


def _write_shards(capture: Capture, source: Source) -> None:
    """The shards of this rank that are not there yet, with a bar on the first one."""
    args = capture.args
    mine = capture.parts[args.process_index :: args.world_size]
    left = [part for part in mine if not capture.is_whole(part)]
    shown = args.process_index == 0 and not args.disable_tqdm
    bar = Progress(
        TextColumn("asking the teacher"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[told]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
    with bar:
        total = sum(capture.rows(part) for part in left)
        each = sum(capture.bytes(part) for part in left) / max(total, 1)
        task = bar.add_task("", total=total, told=f"up to {each:,.0f} bytes each")
        rows = size = 0
        for part in left:
            shard = write_shard(capture, part, source, lambda n: bar.advance(task, n))
            rows, size = rows + shard.rows, size + shard.bytes
            speed = bar.tasks[0].speed or 0.0
            told = f"{speed:,.0f} a second, {size / max(rows, 1):,.1f} bytes each"
            bar.update(task, told=told)
