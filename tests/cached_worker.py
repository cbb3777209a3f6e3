"""Trains from a cache on any number of ranks, eight examples a step; rank 0 saves the weights."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llm_distill import Cached, CrossEntropy, DistillTrainer, HiddenStates, Logits
from llm_distill.layers import explicit
from tests import launch, tiny


def main(cache: str, target: str, what: str = "logits") -> None:
    """Train, and save.

    Args:
        cache: Its folder.
        target: Of the weights.
        what: `hints`: hidden states of all tokens as well.
    """
    hint = HiddenStates(layers=partial(explicit, pairs=[[1, 2], [2, 4]]), rows="valid")
    args = tiny.arguments(Path(target).parent / f"out-{Path(target).name}", max_steps=2)
    args.per_device_train_batch_size = 8 // args.world_size
    trainer = DistillTrainer(
        tiny.llama("student"),
        Cached(cache),
        [CrossEntropy(weight=0.1), Logits(), *([hint] if what == "hints" else [])],
        args,
        train_dataset=tiny.rows(32, empty=(3,)).select(range(24)),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    if args.process_index == 0:
        torch.save(nn.utils.parameters_to_vector(trainer.student.parameters()).detach(), target)
    launch.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
