"""Trains against a server; started alone or by torchrun.

Usage: python -m tests.remote_worker URL OF FILE
       python -m tests.remote_worker run RECIPE URL URL   (the command line; each rank has its own)
"""

import os
import sys

import torch

from tests import tiny
from tests.launch import finish


def train(url: str, of: str, file: str) -> None:
    """Three steps of a global batch of 8; rank 0 writes the weights."""
    from llm_distill import DistillTrainer, Logits, Remote

    torch.set_num_threads(1)
    args = tiny.arguments("out")
    args.per_device_train_batch_size = 8 // args.world_size
    trainer = DistillTrainer(
        tiny.llama("student"),
        Remote(url, "teacher", top_k=8, of=of),
        [Logits()],
        args,
        train_dataset=list(tiny.rows(24, empty=(1, 9))),
    )
    trainer.train()
    if args.process_index == 0:
        torch.save(torch.nn.utils.parameters_to_vector(trainer.distiller.parameters()), file)
    finish()


def run(recipe: str, *urls: str) -> int:
    """`llm-distill run`; its exit code."""
    from llm_distill.cli import main

    torch.set_num_threads(1)
    return main(["run", recipe, f"--teacher.Remote.url={urls[int(os.environ['RANK'])]}"])


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(run(*sys.argv[2:]))
    train(*sys.argv[1:])
