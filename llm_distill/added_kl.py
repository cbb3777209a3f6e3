"""What quantising a teacher adds: KL(whole ‖ quantised), measured once and kept beside the run.

Weights are read twice: the whole teacher is asked about a few sequences of the training data and
let go, then the quantised one is opened for the training and asked about the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import IterableDataset as Stream
from torch.utils.data import IterableDataset as TorchStream

from llm_distill import binding, comparing
from llm_distill.binding import make_batch
from llm_distill.data.given import head as first
from llm_distill.preparation import COLUMNS, readable
from llm_distill.publishing import versions
from llm_distill.quantising import KINDS
from llm_distill.surveying import agreed, stamp
from llm_distill.teachers import Cached, Ensemble, Local, Routed
from llm_distill.teachers.ensemble import EnsembleSource
from llm_distill.teachers.routed import RoutedSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import TrainingArguments

    from llm_distill.preparation import Run
    from llm_distill.rows import Batch
    from llm_distill.teachers import Source, Teacher

SEQUENCES, LENGTH = 16, 256
"""Of the training data, and tokens of each, that both are asked about."""
BATCH = 8
"""Sequences that are asked about together, whatever a training's batch: figures stay the same."""
FILE = "added_kl.json"


@dataclass(frozen=True)
class Added:
    """What quantising one teacher adds.

    Attributes:
        teacher: Its name.
        quantize: How it is quantised.
        kl: KL(whole || quantised) in nats per supervised token; None where it was not measured.
        agreement: Share of tokens of which both hold the same for the likeliest.
        tokens: Supervised ones it was measured on.

    >>> print(Added("32B", "torchao_int8", 0.0013, 0.992, 4080))
    teacher 32B: torchao_int8 adds a KL of 0.0013 nats per token, agreement 99.2 % (4,080 tokens)
    """

    teacher: str
    quantize: str
    kl: float | None = None
    agreement: float | None = None
    tokens: int = 0

    def __str__(self) -> str:
        """One line for people."""
        if self.kl is None or self.agreement is None:
            return f"teacher {self.teacher}: {self.quantize}, what that adds was not measured"
        return (
            f"teacher {self.teacher}: {self.quantize} adds a KL of {self.kl:.3g} nats per token, "
            f"agreement {100 * self.agreement:.1f} % ({self.tokens:,} tokens)"
        )


def opened(
    make: Callable[[], Source], run: Run, args: TrainingArguments, *, compared: bool
) -> tuple[Source, tuple[Added, ...]]:
    """The teacher of a run at work, and what quantising it, or members of it, adds.

    Every rank asks about the same sequences, because whole teachers may lie in pieces.

    Args:
        make: Opens it.
        run: Its training data are read.
        args: Seed, device, and the folder where the figures are kept.
        compared: Whether it is opened for its logits, without which there is no KL.

    Returns:
        One entry for each quantised teacher.
    """
    teachers = _leaves(run.teacher)
    asked = {
        k: t
        for k, t in enumerate(teachers)
        if compared and isinstance(t, Local) and t.quantize and t.measure_quantize
    }
    batches = list(_batches(run, args)) if asked else []
    if not batches:
        return make(), tuple(entry for t in teachers for entry in _unmeasured(t))
    place, key = Path(str(args.output_dir)) / FILE, _key(list(asked.values()), batches)
    found = agreed(_read(place, key), args.device)
    if found is not None:
        source = make()
    else:
        said = {k: comparing.hear(t, batches, args) for k, t in asked.items()}
        source = make()
        each = _leaf_sources(source)
        found = [
            Added(
                t.name, str(t.quantize), *comparing.compare(said[k], batches, each[k], t.name, args)
            )
            for k, t in asked.items()
        ]
        if args.should_save:
            _write(place, key, found)
    measured = dict(zip(asked, found, strict=True))
    entries = ([measured[k]] if k in measured else _unmeasured(t) for k, t in enumerate(teachers))
    return source, tuple(entry for own in entries for entry in own)


def figures(added: Sequence[Added]) -> dict[str, float]:
    """What a cache keeps of it.

    >>> figures([Added("an/id", "torchao_int8", 0.001, 0.99, 100)])
    {'quantised_kl': 0.001, 'quantised_agreement': 0.99, 'quantised_tokens': 100}
    """
    return {
        f"quantised_{name}": value
        for entry in added
        for name, value in asdict(entry).items()
        if entry.kl is not None and name in ("kl", "agreement", "tokens")
    }


def _leaves(teacher: Teacher) -> tuple[Teacher, ...]:
    """The single teachers that are opened with one; a stand-in for an open one has none."""
    if not isinstance(teacher, Ensemble | Routed):
        return (teacher,)
    return tuple(leaf for member in teacher.teachers for leaf in _leaves(member))


def _leaf_sources(source: Source) -> tuple[Source, ...]:
    """The same, at work."""
    if not isinstance(source, EnsembleSource | RoutedSource):
        return (source,)
    return tuple(leaf for member in source.sources for leaf in _leaf_sources(member))


def _unmeasured(teacher: Teacher) -> list[Added]:
    """What is known of a quantised teacher without asking it; nothing of another."""
    if isinstance(teacher, Local) and teacher.quantize is not None:
        return [Added(teacher.name, teacher.quantize)]
    if not isinstance(teacher, Cached) or teacher.store.manifest.quantised is None:
        return []
    manifest = teacher.store.manifest
    kl, agreement, tokens = (
        manifest.fidelity.get(f"quantised_{name}") for name in ("kl", "agreement", "tokens")
    )
    quantised = cast("str", manifest.quantised)
    return [Added(manifest.teacher, quantised, kl, agreement, int(tokens or 0))]


def _batches(run: Run, args: TrainingArguments) -> Iterable[Batch]:
    """The first examples of the training data, cut short, as the teacher reads them."""
    dataset = run.kwargs.get("train_dataset")
    once = isinstance(dataset, TorchStream) and not isinstance(dataset, Stream)
    if dataset is None or once:
        return
    examples = [
        _short(readable(example, args, run.columns))
        for example in first(cast("Iterable[Any]", dataset), SEQUENCES)
    ]
    plan, collate = binding.query_plan(run.terms), replace(run.collator, lookup=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # collators may draw
        for start in range(0, len(examples), BATCH):
            collated = collate(examples[start : start + BATCH])
            batch = make_batch(collated, plan, seed=args.seed, epoch=0).for_teacher
            if len(batch.supervised):
                yield batch.to(args.device)


def _short(example: Any) -> Any:  # noqa: ANN401  what a collator takes
    """An example of at most `LENGTH` tokens; one that is no mapping of columns stays as it is."""
    if not isinstance(example, Mapping):
        return example
    return {k: v[:LENGTH] if k in COLUMNS else v for k, v in example.items()}


def _key(teachers: Sequence[Local], batches: Iterable[Batch]) -> str:
    """What the figures depend on: the weights, how they are quantised and by what, and the text."""
    stamps = [(stamp(t), version(KINDS[str(t.quantize)].library)) for t in teachers]
    keys = [batch.draw.keys for batch in batches]
    return str(zlib.crc32(repr((stamps, keys, LENGTH, versions())).encode()))


def _read(place: Path, key: str) -> list[Added] | None:
    """The figures of an earlier start; None where there are none, or of something else."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return [Added(**entry) for entry in content["added"]] if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(place: Path, key: str, found: Sequence[Added]) -> None:
    """The figures beside the run, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    half = place.with_suffix(".part")
    content = {"key": key, "added": [asdict(entry) for entry in found]}
    half.write_text(json.dumps(content, indent=2), encoding="utf-8")
    half.replace(place)
