"""Trains one student in several splittings of one global batch; started alone or by torchrun.

Usage: python -m tests.exactness_worker ENGINE FOLDER   (ENGINE: one, ddp, fsdp2)
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import tiny
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

EMPTY = (0, 1, 2, 3, 9)
"""Rows without any supervised token: the first micro-batch of rank 0 has none."""


def objectives() -> list[Any]:
    """All three signals, a weight that changes, and projectors of another width."""
    from llm_distill import AttentionMaps, CrossEntropy, HiddenStates, Logits
    from llm_distill.schedules import linear

    return [
        CrossEntropy(weight=0.5),
        Logits(temperature=2.0),
        HiddenStates(weight=partial(linear, start=0.5, end=0.1)),
        AttentionMaps(queries=5, rows="valid"),
    ]


def calibrated_objectives() -> list[Any]:
    """The same, with what data decides first: a fitted projector, matched heads; and what moves."""
    from llm_distill import AttentionMaps, HiddenStates, Logits, Taid, jsd
    from llm_distill.heads import match
    from llm_distill.layers import last, uniform
    from llm_distill.objectives import Relations

    fitted = HiddenStates(weight=0.2, layers=last, init="least_squares", rows="valid")
    maps = AttentionMaps(queries=5, rows="valid", heads=match, layers=uniform)
    relations = Relations(weight=0.1, queries=5, rows="valid")
    moving = Logits(loss=jsd, name="moving", target=Taid(start=0.2, pace=0.3, momentum=0.5))
    return [*objectives()[:3], fitted, maps, relations, moving]


def train(folder: Path, batch: int, accumulation: int, data: Any) -> Any:
    """Three steps; the trainer."""
    from llm_distill import DistillTrainer

    args = tiny.arguments(
        folder / "out",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    models = tiny.llama("student"), tiny.llama("teacher")
    trainer = DistillTrainer(*models, calibrated_objectives(), args, train_dataset=data)
    trainer.train()
    return trainer


def whole(trainer: Any) -> dict[str, torch.Tensor]:
    """Every weight of student and projectors, gathered."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if trainer.is_fsdp_enabled:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered: Any = get_model_state_dict(trainer.model, options=options)
        return dict(gathered)
    return {k: v.detach().clone() for k, v in trainer.distiller.state_dict().items()}


def main(engine: str, folder: Path) -> None:
    """Run all splittings of 8 rows that this launch allows."""
    torch.set_num_threads(1)
    if engine == "fsdp2":
        fsdp2_on_cpu()
    ranks = 1 if engine == "one" else 2
    sets = {
        "full": list(tiny.rows()),
        "empty": list(tiny.rows(empty=EMPTY)),  # a list: our own preparation drops empty rows
        "stream": tiny.rows().to_iterable_dataset(),
    }
    facts: dict[str, Any] = {}
    for label, data in sets.items():
        for batch in (8 // ranks, 1):
            trainer = train(folder, batch, 8 // ranks // batch, data)
            facts[f"{label} {ranks}x{batch}x{8 // ranks // batch}"] = whole(trainer)
            facts |= _engine(trainer)
            facts |= _numbers(trainer, f"{label} {batch}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(facts, folder / f"{engine}.pt")
    finish()


def _engine(trainer: Any) -> dict[str, Any]:
    """What really ran; FSDP's root stays gathered after an evaluation, so this comes before."""
    facts = {"world": trainer.args.world_size, "wrapped": type(trainer.model_wrapped).__name__}
    if not trainer.is_fsdp_enabled:
        return facts
    parameters = list(trainer.model.parameters())
    sharded = sum(hasattr(parameter, "placements") for parameter in parameters)
    groups = _groups(trainer.model)
    return facts | {"groups": groups, "dtensors": sharded, "parameters": len(parameters)}


def _numbers(trainer: Any, label: str) -> dict[str, Any]:
    """Training logs, and an evaluation of 9 rows, which no number of ranks divides."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = ("loss", "target", "kl", "agreement", "entropy")
    logs = [{key: e[key] for key in e if key.startswith(told)} for e in entries]
    metrics = trainer.evaluate(eval_dataset=tiny.rows(9))
    slow = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    kept = {k: v for k, v in metrics.items() if k.startswith("eval_") and k not in slow}
    return {f"logs {label}": logs, f"eval {label}": kept}


def _groups(model: torch.nn.Module) -> list[str]:
    """Modules that FSDP2 gathers one by one."""
    from torch.distributed.fsdp import FSDPModule

    return [
        name or "<root>" for name, module in model.named_modules() if isinstance(module, FSDPModule)
    ]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
