"""Trains four steps straight, and again from the checkpoint of step two.

Usage: python -m tests.resume_worker ENGINE FOLDER   (ENGINE: one, ddp, fsdp2_full, fsdp2_sharded)
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

from tests import tiny
from tests.exactness_worker import calibrated_objectives, whole
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

STUDENTS = ("plain", "tied", "lora")


def build(
    kind: str, folder: Path, ranks: int, *, taught: int = -1, student: Any = None, **changes: Any
) -> Any:
    """A trainer with AdamW, dropout and a projector to one layer, saving at step two."""
    from llm_distill import DistillTrainer
    from llm_distill.layers import explicit

    student = student or tiny.llama("student", tied=kind == "tied")
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.1
    args = tiny.arguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=4 // ranks,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        train_sampling_strategy="random",
        **changes,
    )
    wanted = calibrated_objectives()
    if taught != -1:
        wanted[3] = replace(wanted[3], layers=partial(explicit, pairs=[[-1, taught]]))
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind == "lora" else None
    return DistillTrainer(
        student,
        tiny.llama("teacher"),
        wanted,
        args,
        train_dataset=tiny.rows(),
        eval_dataset=tiny.rows(5),
        peft_config=adapter,
    )


def best(folder: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    """A run whose later steps are worse, and what was loaded in the end."""
    from llm_distill import DistillTrainer

    args = tiny.arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=8 // ranks,
        learning_rate=20.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **changes,
    )
    models = tiny.llama("student"), tiny.llama("teacher")
    data = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(5)}
    trainer = DistillTrainer(*models, calibrated_objectives(), args, **data)
    trainer.train()
    scores = [log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log]
    return {"scores": scores, "loaded": trainer.evaluate()["eval_kl"]}


def main(engine: str, folder: Path) -> None:
    """All kinds of students."""
    torch.set_num_threads(1)
    if engine.startswith("fsdp2"):
        kind = engine.removeprefix("fsdp2_").upper()
        fsdp2_on_cpu(FSDP_STATE_DICT_TYPE=f"{kind}_STATE_DICT")
    ranks = 1 if engine == "one" else 2
    facts: dict[str, Any] = {}
    for student in STUDENTS:
        out = folder / engine / student
        straight = build(student, out, ranks)
        straight.train()
        resumed = build(student, out, ranks)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        facts[student] = {"straight": whole(straight), "resumed": whole(resumed)}
        facts[student]["files"] = sorted(p.name for p in (out / "checkpoint-2").iterdir())
        resumed.save_model(str(out / "final"))
    try:
        again = build("plain", folder / engine / "plain", ranks, taught=2)
        again.train(resume_from_checkpoint=str(folder / engine / "plain" / "checkpoint-2"))
    except ValueError as error:
        facts["other"] = str(error)
    facts["best"] = best(folder / engine / "best", ranks)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(facts, folder / f"{engine}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
