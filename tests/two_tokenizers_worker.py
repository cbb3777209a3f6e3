"""Trains a student with a teacher of other tokens in several splittings of one global batch.

Usage: python -m tests.two_tokenizers_worker ENGINE FOLDER   (ENGINE: one, ddp)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import on_disk, tiny
from tests.exactness_worker import whole
from tests.launch import finish

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog",
    "sees",
    "a",
    "café",
    "where",
    "zebras",
]


def texts(count: int) -> list[str]:
    """Of 0 to 12 words; the first and every 13th after it have none."""
    return [" ".join((WORDS[k % 3 :] + WORDS)[: k * 5 % 13]) for k in range(count)]


def data(count: int = 24) -> list[dict[str, list[int]]]:
    """In the student's tokens, each with an end; a list, so that none is dropped beforehand."""
    tokenizer = on_disk.tokenizer()
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in ids]


def models() -> dict[str, Any]:
    """Two models with a tokenizer each, as arguments of `DistillTrainer`."""
    from llm_distill import Local

    teacher = tiny.llama("teacher", vocabulary=on_disk.FOREIGN)
    return {
        "model": tiny.llama("student", vocabulary=on_disk.VOCABULARY),
        "teacher": Local(teacher, tokenizer=on_disk.foreign("left")),
        "processing_class": on_disk.tokenizer(),
    }


def objectives() -> list[Any]:
    """What does not depend on the micro-batch: means of texts, one by one."""
    from llm_distill import CrossEntropy, HiddenStates
    from llm_distill.layers import uniform

    hint = HiddenStates(layers=uniform, skip=1, items="pooled", rows="valid")
    return [CrossEntropy(weight=0.5), hint]


def train(folder: Path, batch: int, accumulation: int) -> dict[str, Any]:
    """Three steps; the weights, the logs, and an evaluation of 9 texts."""
    from llm_distill import DistillTrainer

    args = tiny.arguments(
        folder / "out",
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer = DistillTrainer(
        **models(),
        objectives=objectives(),
        args=args,
        train_dataset=data(),
        eval_dataset=data(9),
    )
    trainer.train()
    logs = [
        {k: v for k, v in log.items() if k.startswith("loss")} for log in trainer.state.log_history
    ]
    slow = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {
        "state": whole(trainer),
        "logs": [log for log in logs if log],
        "eval": {k: v for k, v in trainer.evaluate().items() if k not in slow},
        "world": trainer.args.world_size,
    }


def main(engine: str, folder: Path) -> None:
    """All splittings of 8 texts that this launch allows."""
    torch.set_num_threads(1)
    share = 8 if engine == "one" else 4
    found = {
        f"{batch}x{share // batch}": train(folder, batch, share // batch) for batch in (share, 1)
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, folder / f"{engine}.pt")
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
