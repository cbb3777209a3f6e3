"""Trains beside a teacher in pieces, and watches it; started alone or by torchrun.

Usage: python -m tests.placement_worker ENGINE FOLDER CELL...   (ENGINE: one, ddp, fsdp2)

A cell is MODEL:SHARD[:SIZE], such as llama:tp:2; with :micro behind it there are micro-batches of
one sequence, and with :step the teacher reads those of a step at once; with :data there is a map
from data, fitted projectors, matched heads, and an evaluation of 9 rows, which no number of ranks
divides; with :hidden, hidden states of lower blocks alone: upper blocks are not loaded. `pair` and
`routed` are two teachers in pieces, heard together or each about its own examples; `own` is a model
whose code lies beside it. Instead of SHARD, `disk` is a map over memory and disk, and `anywhere` is
`device_map: auto` where there is less memory than the teachers need.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import tiny
from tests.exactness_worker import EMPTY, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish, from_all
from tests.reading import watched
from tests.watching import Watch

MEMORY = 1_200_000
"""Bytes of a machine; two processes have half of it each, and the teachers half of that."""


def objectives() -> list[Any]:
    """Logits, hidden states with a projector, attention maps and relations."""
    from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits, Relations
    from llm_distill.layers import uniform

    return [
        CrossEntropy(weight=0.5),
        Logits(temperature=2.0),
        HiddenStates(weight=0.5, layers=uniform, init="random", gate=False),
        AttentionMaps(queries=5, rows="valid", layers=uniform),
        Relations(weight=0.1, queries=5, rows="valid", layers=uniform),
    ]


def decided() -> list[Any]:
    """What data decide before the training; hidden states alone are read of upper layers."""
    from llm_distill import AttentionMaps, HiddenStates, Logits
    from llm_distill.heads import match
    from llm_distill.layers import last

    return [Logits(), HiddenStates(gate=False), AttentionMaps(heads=match, layers=last, queries=5)]


def lower() -> list[Any]:
    """What needs neither the teacher's head nor its upper blocks."""
    from llm_distill import CrossEntropy, HiddenStates
    from llm_distill.layers import first

    return [CrossEntropy(), HiddenStates(layers=first, init="random", gate=False)]


def together() -> list[Any]:
    """Logits of both teachers, and a hint of one."""
    from llm_distill import HiddenStates, Logits
    from llm_distill.layers import uniform

    return [Logits(), HiddenStates(member=1, layers=uniform, init="random", gate=False)]


def apart() -> list[Any]:
    """What experts give."""
    from llm_distill import CrossEntropy, HiddenStates, Logits
    from llm_distill.layers import last

    hint = HiddenStates(layers=last, init="random", gate=False)
    return [CrossEntropy(weight=0.5), Logits(temperature=2.0), hint]


def logits() -> list[Any]:
    """What every model gives."""
    from llm_distill import CrossEntropy, Logits

    return [CrossEntropy(weight=0.5), Logits(temperature=2.0)]


def teacher_of(folder: Path, kind: str, settings: dict[str, Any]) -> Any:
    """One model, or two."""
    from llm_distill import Ensemble, Local, Routed

    if kind == "pair":
        return Ensemble([Local(str(folder / name), **settings) for name in ("llama", "tied")])
    if kind == "routed":
        experts = {name: Local(str(folder / name), **settings) for name in ("llama", "tied")}
        return Routed(experts, by="domain")
    return Local(str(folder / kind), **settings)


def examples(kind: str) -> list[dict[str, Any]]:
    """Rows; those of the first rank's first batch have one expert."""
    rows: list[dict[str, Any]] = [dict(row) for row in tiny.rows(empty=EMPTY)]
    for place, row in enumerate(rows if kind == "routed" else ()):
        row["domain"] = "tied" if place < 4 or place % 3 else "llama"
    return rows


def student(kind: str) -> Any:
    """Of the same kind of model, smaller."""
    makers = {"gpt2": lambda: tiny.gpt2(depth=2), "bert": lambda: tiny.bert(depth=2)}
    return makers.get(kind, lambda: tiny.llama("student"))()


def settings_of(kind: str, shard: str, words: list[str], patch: Any) -> dict[str, Any]:
    """How a teacher shall lie, on a small machine where it may lie anywhere."""
    from llm_distill.placement import launch

    given: dict[str, Any] = {"trust_remote_code": kind == "own"}
    if shard == "disk":
        return given | {"device_map": tiny.DISK}
    if shard == "anywhere":
        patch.setattr(launch, "free_bytes", lambda device: MEMORY)
        return given | {"device_map": "auto"}
    size = next((int(word) for word in words if word.isdigit()), None)
    return given | {"shard": shard, "shard_size": size, "once_per_step": "step" in words}


def train(folder: Path, cell: str) -> dict[str, Any]:
    """Three steps over 8 rows a step, whatever the ranks; weights, and what was seen."""
    from llm_distill import DistillTrainer

    kind, shard, *more = cell.split(":")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = 1 if {"step", "micro"} & {*more} else 8 // ranks
    args = tiny.arguments(
        folder / "out",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // ranks // batch,
    )
    sets = {"data": decided, "hidden": lower, "pair": together, "routed": apart, "own": logits}
    make = next((made for word, made in sets.items() if word in (kind, *more)), objectives)
    with pytest.MonkeyPatch.context() as patch:
        read = watched(patch)
        trainer = DistillTrainer(
            student(kind),
            teacher_of(folder, kind, settings_of(kind, shard, more, patch)),
            make(),
            args,
            train_dataset=examples(kind),
        )
    whole_source: Any = trainer._source
    sources = whole_source.sources if kind in ("pair", "routed") else [whole_source]
    source = sources[0]
    watch = Watch(source.model)
    trainer.train()
    facts = {"weights": whole(trainer), **_told(trainer, source)} | watch.told()
    facts["read"] = from_all(sum(size for _, size in read))
    facts["load"] = sum(_size(each.model) for each in sources)
    if "data" in more:
        metrics = trainer.evaluate(eval_dataset=tiny.rows(9))
        facts["eval"] = {k: metrics[k] for k in ("eval_kl", "eval_agreement", "eval_loss")}
    return facts


def _told(trainer: Any, source: Any) -> dict[str, Any]:
    """Where the teacher lies after three steps, and what runs."""
    from torch.distributed.tensor import DTensor

    from llm_distill.placement import groups, resident_bytes

    model = source.model
    return {
        "world": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "groups": groups(model),
        "resident": from_all(resident_bytes(model)),
        "places": sorted(set(map(str, getattr(model, "hf_device_map", {}).values()))),
        "whole": _size(model),
        "gathered": [n for n, p in model.named_parameters() if not isinstance(p, DTensor)],
        "told": list(source.told),
    }


def _size(model: Any) -> int:
    """Bytes of all weights, wherever they lie; of tied ones once."""
    return sum({id(p): p.numel() * p.element_size() for p in model.parameters()}.values())


def main(engine: str, folder: Path, cells: list[str]) -> None:
    """All cells in one launch."""
    torch.set_num_threads(1)
    if engine == "fsdp2":
        fsdp2_on_cpu()
    facts = {cell: train(folder, cell) for cell in cells}
    if not dist.is_initialized() or dist.get_rank() == 0:
        ranks = os.environ.get("WORLD_SIZE", "1")
        torch.save(facts, folder / f"{engine}{ranks}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
