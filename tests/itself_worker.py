"""Trains students that are their own teachers, in several splittings; alone or by torchrun.

Usage: python -m tests.itself_worker ENGINE FOLDER   (ENGINE: one, ddp, fsdp2, fsdp2_sharded)
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

from tests import tiny
from tests.exactness_worker import EMPTY, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

DECAY = 0.6
TEACHERS = ("born_again", "ema", "adapter_off", "adapted_ema")
DEEP = "deep"
"""The student's own layers; of these KL and agreement say nothing, and step 0 is no special one."""
ADAPTED = ("adapter_off", "adapted_ema")


def spec(kind: str) -> Any:
    """The teacher."""
    from llm_distill import AdapterOff, BornAgain, DeepToShallow, Ema

    made = {"born_again": BornAgain(), "adapter_off": AdapterOff(), "deep": DeepToShallow()}
    return made.get(kind) or Ema(decay=DECAY)


def build(kind: str, folder: Path, batch: int, accumulation: int, **changes: Any) -> Any:
    """A trainer on logits, labels and a hidden layer of its own teacher."""
    from llm_distill import CrossEntropy, DistillTrainer, HiddenStates, Logits
    from llm_distill.layers import explicit, last

    args = tiny.arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{"max_steps": 4} | changes,
    )
    objectives = [
        CrossEntropy(weight=1.0),
        Logits(temperature=2.0, weight=0.5),
        HiddenStates(layers=last, weight=0.2, gate=False),
    ]
    if kind == DEEP:
        deeper = partial(explicit, pairs=[[1, 2]])
        objectives = [
            CrossEntropy(weight=1.0),
            Logits(temperature=2.0, weight=0.5, exit=1),
            HiddenStates(layers=deeper, weight=0.2),
            CrossEntropy(weight=0.1, exit=1),
        ]
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind in ADAPTED else None
    return DistillTrainer(
        tiny.llama("student"),
        spec(kind),
        objectives,
        args,
        train_dataset=list(tiny.rows(empty=EMPTY)),
        eval_dataset=list(tiny.rows(5)),
        peft_config=adapter,
    )


def facts(trainer: Any) -> dict[str, Any]:
    """Weights of student and teacher, and the figures of the log."""
    logs = [log for log in trainer.state.log_history if "loss/Logits" in log]
    kept = [{k: log[k] for k in log if k.startswith(("loss", "kl"))} for log in logs]
    return {"weights": whole(trainer), "logs": kept}


def main(engine: str, folder: Path) -> None:
    """Every teacher, whole and in micro-batches, and one resumed in the middle."""
    torch.set_num_threads(1)
    if engine.startswith("fsdp2"):
        kind = "SHARDED" if engine == "fsdp2_sharded" else "FULL"
        fsdp2_on_cpu(FSDP_STATE_DICT_TYPE=f"{kind}_STATE_DICT")
    ranks = 1 if engine == "one" else 2
    found: dict[str, Any] = {}
    for kind in (*TEACHERS, DEEP):
        for batch in (8 // ranks, 1):
            trainer = build(kind, folder / engine, batch, 8 // ranks // batch)
            trainer.train()
            found[f"{kind} {batch * ranks}"] = facts(trainer)
            found["wrapped"] = type(trainer.model_wrapped).__name__
            found[f"{kind} groups"] = _groups(trainer.model)
            if trainer.is_fsdp_enabled:
                sharded = [hasattr(p, "placements") for p in trainer.model.parameters()]
                found[f"{kind} sharded"] = all(sharded)
    for kind in ("ema", "adapted_ema"):
        given = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
        given |= {"learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 1}
        out = folder / engine / kind
        straight = build(kind, out, 4 // ranks, 2, **given)
        straight.train()
        resumed = build(kind, out, 4 // ranks, 2, **given)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        found[f"{kind} straight"], found[f"{kind} resumed"] = facts(straight), facts(resumed)
        found[f"{kind} files"] = sorted(p.name for p in (out / "checkpoint-2").iterdir())
        resumed.save_model(str(out / "final"))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, folder / f"{engine}.pt")
    finish()


def _groups(model: torch.nn.Module) -> list[str]:
    """Modules that FSDP2 gathers one by one."""
    from torch.distributed.fsdp import FSDPModule

    return [n or "<root>" for n, module in model.named_modules() if isinstance(module, FSDPModule)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
