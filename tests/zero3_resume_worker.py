"""Trains four steps under ZeRO-3 straight, and again from the checkpoint of step two.

Usage: python -m tests.zero3_resume_worker FOLDER   (under torchrun)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import resume_worker
from tests.launch import finish
from tests.zero3_worker import configuration, gathered


def main(folder: Path) -> None:
    """All kinds of students."""
    torch.set_num_threads(1)
    ranks = dist.get_world_size() if dist.is_initialized() else 2
    engine: dict[str, Any] = {"deepspeed": configuration("zero3", bare=False)}
    facts: dict[str, Any] = {}
    for kind in resume_worker.STUDENTS:
        out = folder / kind
        straight = resume_worker.build(kind, out, ranks, **engine)
        straight.train()
        resumed = resume_worker.build(kind, out, ranks, **engine)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        facts[kind] = {"straight": gathered(straight), "resumed": gathered(resumed)}
        facts[kind]["files"] = sorted(p.name for p in (out / "checkpoint-2").iterdir())
        resumed.save_model(str(out / "final"))
    again = resume_worker.build("plain", folder / "plain", ranks, taught=2, **engine)
    try:
        again.train(resume_from_checkpoint=str(folder / "plain" / "checkpoint-2"))
    except ValueError as error:
        facts["other"] = str(error)
    facts["best"] = resume_worker.best(folder / "best", ranks, **engine)
    seen = resume_worker.build("plain", folder / "seen", ranks, **engine)
    seen.evaluate()
    try:
        seen.train()
    except ValueError as error:
        facts["evaluated"] = str(error)
    try:
        resume_worker.build("plain", folder / "seen", ranks, student=seen.student, **engine)
    except ValueError as error:
        facts["again"] = str(error)
    other = {**engine["deepspeed"], "gradient_clipping": 1.0}
    try:
        resume_worker.build("plain", folder / "seen", ranks, deepspeed=other)
    except ValueError as error:
        facts["differs"] = str(error)
    if dist.get_rank() == 0:
        torch.save(facts, folder / "resume.pt")
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
