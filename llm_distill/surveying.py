"""How similar the layers are: unbiased CKA of a few hundred sequences, kept beside the run."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_distill import mapping
from llm_distill.capture import Reader
from llm_distill.data.given import head
from llm_distill.layers import LayerEvidence, Similarities, Similarity, keep
from llm_distill.losses.softmax import wide
from llm_distill.picks import Pick, Picked, pick
from llm_distill.preparation import COLUMNS, make_batch, readable
from llm_distill.signals import Request
from llm_distill.students import Made

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn
    from transformers import TrainingArguments

    from llm_distill.preparation import Run
    from llm_distill.rows import Batch
    from llm_distill.signals import Signals
    from llm_distill.teachers import Source

SEQUENCES, LENGTH = 256, 128
"""Of the training data, and tokens of each, that similarities are measured on."""
POOLED = 512
"""Sequences where they themselves are compared, not their tokens."""
SETS = 8
"""Disjoint sets of sequences; their spread is the standard error."""
TOKENS = 512
"""Of each set: the Gram matrices are that large, whatever the width."""
SINKS = 4
"""Tokens at the start of each sequence that are left out: states there are many times longer."""
FEWEST = 16
"""Tokens, or sequences, of a set below which it says nothing."""
FILE = "calibration.safetensors"

Found = TypeVar("Found")


def survey(
    run: Run,
    student: nn.Module,
    source: Source,
    args: TrainingArguments,
    *,
    kept: bool = True,
    member: int | None = None,
) -> LayerEvidence:
    """What the layer strategies of a run ask for; measured once, then read from its folder.

    Args:
        run: Its objectives say what is needed.
        student: In evaluation mode while it is read.
        source: The teacher.
        args: Seed, device, and the folder.
        kept: Whether figures are read from the folder and written to it; not those of a student
            that has been trained since it was loaded.
        member: Which of several teachers is looked at.

    Returns:
        Similarities; None where nobody asks for them, or the data are too few to tell.
    """
    own = [o for o in run.objectives if mapping.member_of(o) == member]
    asked = mapping.requests(own, run.student, run.teacher.spec)
    told = LayerEvidence(blocks=run.student.blocks)
    if asked == (Request(), Request()) or run.kwargs.get("train_dataset") is None:
        return told
    batches = list(_batches(run, args, crossed=asked[0] != Request()))
    key = _key(run, asked, batches) if kept else None
    place = Path(str(args.output_dir)) / FILE
    found = agreed(None if key is None else _read(place, key, args.device), args.device)
    if found is None:
        source.ask(asked[1])
        if asked[0] != Request():
            student.to(args.device)
        training = student.training
        student.eval()
        try:
            found = _measure(batches, student, source, asked, run.student.name, member)
        finally:
            student.train(training)
        if key is not None and args.should_save and found:
            _write(place, key, found)
    return replace(told, similarity=found.get("similarity"), cross=found.get("cross"))


@torch.no_grad()
def _measure(
    batches: Iterable[Batch],
    student: nn.Module,
    source: Source,
    asked: tuple[Request, Request],
    name: str,
    member: int | None,
) -> dict[str, Similarity]:
    """Similarity of teacher layers, and of student with teacher layers where that is asked."""
    gathered = Similarities()
    wanted = asked[1] if member is None else asked[1].member(member)
    reader = Reader(student, asked[0], f"student {name}") if asked[0] != Request() else None
    for batch in batches:
        picked = _picked(batch, crossed=reader is not None)
        heard = source(batch.for_teacher).member(member)
        theirs = _members(heard, picked.for_teacher, wanted)
        own: list[Tensor] = []
        if reader is not None:
            own = _members(reader.read(batch), picked, asked[0])
        kept = _spread(keep([*theirs, *own]).nonzero()[:, 0])
        if len(kept) >= FEWEST:
            gathered.add([x[kept] for x in theirs], [x[kept] for x in own] or None)
    return {name: _alike(value) for name, value in gathered.result().items()}


def _spread(places: Tensor) -> Tensor:
    """At most `TOKENS` places, from all sequences alike: `[n] -> [m]`."""
    if len(places) <= TOKENS:
        return places
    return places[torch.arange(TOKENS, device=places.device) * len(places) // TOKENS]


def _picked(batch: Batch, *, crossed: bool) -> Picked:
    """What is compared: tokens, or whole sequences where both models read their own tokens."""
    if crossed and batch.theirs is not None:
        return pick(batch, Pick("valid", "pooled", SINKS))
    return pick(batch if crossed else batch.for_teacher, Pick("valid", skip=SINKS, most=2 * TOKENS))


def _members(signals: Signals, picked: Picked, asked: Request) -> list[Tensor]:
    """Hidden states of what is compared, ascending by layer: L x `[n, D]`."""
    layers = sorted(asked.hidden)
    return [wide(picked.gather(signals.hidden(layer, picked.rows))) for layer in layers]


def _batches(run: Run, args: TrainingArguments, *, crossed: bool) -> Iterator[Batch]:
    """The first examples of the training data, cut short, in disjoint sets."""
    dataset = cast("Iterable[Any]", run.kwargs["train_dataset"])
    pooled = crossed and run.tokenizers.theirs is not None
    first = head(dataset, POOLED if pooled else SEQUENCES)
    examples = [_short(readable(example, args, run.columns)) for example in first]
    size = max(1, -(-len(examples) // SETS))
    collate = replace(run.collator, valid=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # collators may draw
        for start in range(0, len(examples), size):
            collated = collate(examples[start : start + size])
            yield make_batch(collated, None, seed=args.seed, epoch=0).to(args.device)


def _short(example: Any) -> Any:  # noqa: ANN401  what a collator takes
    """An example of at most `LENGTH` tokens; one that is no mapping of columns stays as it is."""
    if not isinstance(example, Mapping):
        return example
    return {k: v[:LENGTH] if k in COLUMNS else v for k, v in example.items()}


def agreed(found: Found | None, device: torch.device) -> Found | None:
    """What was found, if every rank found it: else some would measure and wait for the others."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    flag = torch.tensor(int(found is not None), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return found if flag else None


def _alike(similarity: Similarity) -> Similarity:
    """Rank 0's figures on every rank."""
    if dist.is_available() and dist.is_initialized():
        for tensor in (similarity.values, similarity.errors):
            dist.broadcast(tensor, src=0)
    return similarity


def _key(run: Run, asked: tuple[Request, Request], batches: Iterable[Batch]) -> str | None:
    """What the figures depend on: both models, the layers and the text.

    Returns:
        None where a model was given loaded: nothing tells its weights from others.
    """
    stamps = [stamp(run.teacher)]
    if asked[0] != Request():
        stamps.append(stamp(run.model))
    if None in stamps:
        return None
    keys = [(batch.draw.keys, batch.for_teacher.draw.keys) for batch in batches]
    layers = [len(request.hidden) for request in asked]
    return str(zlib.crc32(repr((stamps, layers, keys, LENGTH, TOKENS, SINKS)).encode()))


def stamp(spec: Any) -> str | None:  # noqa: ANN401  a student or a teacher
    """Which weights a spec stands for."""
    name = getattr(spec, "model", spec)
    if isinstance(spec, Made):  # of the teacher, which has a stamp of its own
        return repr(spec)
    if not isinstance(name, str):
        return None
    files = sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")])
    written = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return f"{spec} {written}"


def _read(place: Path, key: str, device: torch.device) -> dict[str, Similarity] | None:
    """The figures of an earlier start; None where there are none, or of something else."""
    try:
        with safe_open(str(place), framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except (OSError, SafetensorError):
        return None
    names = {name.partition(".")[0] for name in tensors}
    return {
        name: Similarity(tensors[f"{name}.values"], tensors[f"{name}.errors"]) for name in names
    }


def _write(place: Path, key: str, found: Mapping[str, Similarity]) -> None:
    """The figures beside the run, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.values": value.values.contiguous() for name, value in found.items()}
    tensors |= {f"{name}.errors": value.errors.contiguous() for name, value in found.items()}
    half = place.with_suffix(".part")
    save_file(tensors, half, metadata={"key": key})
    half.replace(place)
