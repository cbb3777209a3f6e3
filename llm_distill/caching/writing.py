"""From a prepared run to a finished cache, on any number of ranks."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llm_distill import added_kl, hints, loading
from llm_distill.cache import estimators, fingerprints, frames
from llm_distill.cache.encoded import Fidelity
from llm_distill.cache.index import FILE as INDEX
from llm_distill.cache.index import Index, Place
from llm_distill.cache.layers import Lost
from llm_distill.cache.manifest import FILE, UNFINISHED, Manifest, Shard
from llm_distill.cache.shards import ShardReader
from llm_distill.cache.store import HEAD, TEACHER, save_head
from llm_distill.caching.asking import write_shard
from llm_distill.caching.deciding import decided
from llm_distill.caching.framing import framed
from llm_distill.caching.room import check_disk
from llm_distill.capture import plain
from llm_distill.errors import InputError
from llm_distill.lm_head import head_of
from llm_distill.pieces import in_pieces
from llm_distill.publishing import versions
from llm_distill.signals import Request
from llm_distill.teachers import Local

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    done = not overwrite and (capture.folder / FILE).is_file()
    if not done:
        check_disk(capture)
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
        _together(capture)  # all have looked before the first one writes
        if capture.args.process_index == 0 and there is None:
            _prepare_folder(capture, begun, source)
        _together(capture)
        _write_shards(capture, source)
    finally:
        source.close()
    _together(capture)
    if capture.args.process_index == 0:
        _finish(capture)
    _together(capture)
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


def _together(capture: Capture) -> None:
    """Wait for the other ranks."""
    state: Any = capture.args.distributed_state
    if state is not None:
        state.wait_for_everyone()


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
    folder = capture.folder
    head = _head_to_keep(source) if capture.estimator.example() is None else None
    folder.mkdir(parents=True, exist_ok=True)
    _clear(capture)
    config = copy.deepcopy(capture.run.teacher.config)
    if not config.architectures and source.model is not None:
        config.architectures = [type(plain(source.model)).__name__]
    config.save_pretrained(folder / TEACHER)
    tokenizer = capture.run.kwargs["processing_class"]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / TEACHER)
    if head is not None:
        begun = replace(begun, head=save_head(folder, head))
    if capture.layers is not None:
        frames.save(framed(capture, source), folder)
        begun = replace(begun, frames=fingerprints.of_file(folder / frames.FILE))
    begun.write(folder / UNFINISHED)


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


def _clear(capture: Capture) -> None:
    """Delete an earlier cache, and nothing else."""
    folder = capture.folder
    for name in (FILE, UNFINISHED, INDEX, HEAD, frames.FILE):
        (folder / name).unlink(missing_ok=True)
    for pattern in ("train-*.parquet*", "eval-*.parquet*", "*.part"):
        for file in folder.glob(pattern):
            file.unlink()
    shutil.rmtree(folder / TEACHER, ignore_errors=True)


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


def _finish(capture: Capture) -> None:
    """Index and manifest, which is the last to be written; the notes go."""
    folder = capture.folder
    begun = Manifest.read(folder / UNFINISHED)
    notes = [json.loads(capture.note(p).read_text(encoding="utf-8")) for p in capture.parts]
    shards = tuple(Shard(**note["shard"]) for note in notes)
    fidelity = sum((Fidelity(**note["fidelity"]) for note in notes), start=Fidelity())
    keys: list[bytes] = []
    places: list[Place] = []
    for number, shard in enumerate(shards):
        reader = ShardReader.open(folder / shard.file, ())
        for group, found in enumerate(reader.keys_by_group()):
            keys += found
            places += (Place(number, group, row) for row in range(len(found)))
    Index.of(keys, places).write(folder)
    index = fingerprints.of_file(folder / INDEX)
    told = {**fidelity.means(), **begun.fidelity}
    finished = replace(begun, shards=shards, index=index, fidelity=told)
    replace(finished, lost=_lost(notes)).write(folder / FILE)
    for part in capture.parts:
        capture.note(part).unlink()
    (folder / UNFINISHED).unlink()


def _lost(notes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What the kept states lost, by layer, over all shards."""
    total: dict[str, Lost] = {}
    for note in notes:
        for layer, lost in note.get("lost", {}).items():
            total[layer] = total.get(layer, Lost()) + Lost(**lost)
    return {k: {"mean": lost.mean, "worst": lost.worst} for k, lost in total.items()}
