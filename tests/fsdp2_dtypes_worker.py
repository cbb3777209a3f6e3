"""Trains in bf16 under FSDP2 and notes the dtypes inside the wrapped forward.

Usage: torchrun … -m tests.fsdp2_dtypes_worker FOLDER
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from tests import tiny
from tests.exactness_worker import objectives
from tests.fsdp2_on_cpu import fsdp2_on_cpu
from tests.launch import finish

if TYPE_CHECKING:
    from llm_distill.outcomes import Outcome


def main(folder: Path) -> None:
    """Train one student in bf16, one in fp32."""
    torch.set_num_threads(1)
    fsdp2_on_cpu()
    from accelerate.state import AcceleratorState

    from llm_distill import DistillTrainer
    from llm_distill.distiller import Distiller

    facts: dict[str, Any] = {}
    forward = Distiller.forward

    def noting(self: Any, batch: Any, teacher: Any, step: Any) -> Any:
        def look(module: Any, _: Any) -> None:
            facts["compute"] = str(module.weight.dtype)

        hook = self.student.model.layers[0].mlp.up_proj.register_forward_pre_hook(look)
        out = forward(self, batch, teacher, step)
        hook.remove()
        facts["share"] = str(step.shares.dtype)
        facts["teacher"] = str(teacher.hidden(4, batch.supervised).dtype)
        facts["loss"] = str(cast("Outcome", out).loss.dtype)
        return out

    for key, bf16 in (("plain", False), ("losses", True)):
        Distiller.forward = noting if bf16 else forward  # type: ignore[method-assign]  # to look
        trainer = DistillTrainer(
            tiny.llama("student"),
            tiny.llama("teacher"),
            objectives(),
            tiny.arguments(folder / "out", per_device_train_batch_size=4, bf16=bf16),
            train_dataset=tiny.rows(),
        )
        trainer.train()
        facts[key] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        AcceleratorState._reset_state(reset_partial_state=False)
    if dist.get_rank() == 0:
        torch.save(facts, folder / "dtypes.pt")
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
