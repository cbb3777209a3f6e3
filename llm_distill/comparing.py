"""Asking a teacher whole, and later in fewer bits: KL(whole ‖ quantised), and agreement."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor

from llm_distill.losses.divergences import forward_kl
from llm_distill.signals import Factored, Head, Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import TrainingArguments

    from llm_distill.rows import Batch
    from llm_distill.signals import Whole
    from llm_distill.teachers import Local, Source

ROWS = 128
"""Rows whose logits exist at a time."""


@dataclass(frozen=True)
class Said:
    """What a whole teacher said, in the memory of the host.

    Attributes:
        rows: Of each batch: features before the head `[N, D]`, or logits `[N, V]` where the head
            was not in memory.
        head: The head.
    """

    rows: tuple[Tensor, ...]
    head: Head | None


def hear(teacher: Local, batches: Sequence[Batch], args: TrainingArguments) -> Said:
    """Load a teacher whole, ask it, and let it go.

    Args:
        teacher: Quantised.
        batches: On the device.
        args: Device, and whether bars are shown.
    """
    source = teacher.unquantised.open(Request(logits=True), args.device)
    try:
        return _asked(source, _shown(batches, f"{teacher.name} before it is quantised", args))
    finally:
        source.close()
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()  # what is free is asked of the device


def _asked(source: Source, batches: Iterable[Batch]) -> Said:
    """Everything that it says; what refers to its weights ends here."""
    rows: list[Tensor] = []
    head: Head | None = None
    for batch in batches:
        said = source(batch).whole
        head = _head(said) if head is None else head
        rows.append(_rows(said))
    return Said(tuple(rows), head)


@torch.no_grad()
def _rows(said: Whole) -> Tensor:
    """What is kept of a batch."""
    return (said.head.features(said.hidden) if isinstance(said, Factored) else said.values).cpu()


@torch.no_grad()
def _head(said: Whole) -> Head | None:
    """The head without what comes before it, which is done already."""
    if not isinstance(said, Factored):
        return None
    head = said.head
    bias = None if head.bias is None else head.bias.detach().cpu()
    return Head(head.weight.detach().cpu(), bias, head.scale, head.softcap)


@torch.no_grad()
def compare(
    said: Said, batches: Sequence[Batch], source: Source, name: str, args: TrainingArguments
) -> tuple[float, float, int]:
    """Ask the quantised teacher about the same; rank 0's figures on every rank.

    Args:
        said: By the whole one.
        batches: That it was asked about.
        source: The quantised one.
        name: Of the teacher.
        args: Device, and whether bars are shown.

    Returns:
        KL(whole || quantised) in nats per supervised token, the share of tokens of which both hold
        the same for the likeliest, and how many tokens these were.
    """
    head = None if said.head is None else _on(said.head, args.device)
    kl = alike = 0.0
    tokens = 0
    bar = _shown(batches, f"{name} as it is quantised", args)
    for batch, whole in zip(bar, said.rows, strict=True):
        small = source(batch).whole
        for start in range(0, len(whole), ROWS):
            rows = slice(start, start + ROWS)
            there = whole[rows].to(args.device)
            before = there.float() if head is None else head.logits(there)
            after = small.logits(rows)
            kl += float(forward_kl(after, before).double().sum().cpu())
            alike += int((after.argmax(-1) == before.argmax(-1)).sum())
        tokens += len(whole)
    told = torch.tensor([kl / tokens, alike / tokens], dtype=torch.float32, device=args.device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(told, src=0)
    kl, alike = told.tolist()
    return kl, alike, tokens


def _on(head: Head, device: torch.device) -> Head:
    """A head on a device."""
    bias = None if head.bias is None else head.bias.to(device)
    return replace(head, weight=head.weight.to(device), bias=bias)


def _shown(batches: Sequence[Batch], name: str, args: TrainingArguments) -> Iterable[Batch]:
    """Batches, with a bar on the first rank."""
    shown = args.process_index == 0 and not args.disable_tqdm
    what = f"asking {name}"
    return track(batches, what, console=Console(stderr=True), transient=True, disable=not shown)
