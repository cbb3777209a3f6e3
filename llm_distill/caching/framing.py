"""Where the states of a teacher lie, seen on some thousand tokens of all the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track

from llm_distill.cache.frames import Frame
from llm_distill.caching.asking import batch_of, states_of
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_distill.caching.plan import Capture
    from llm_distill.teachers import Source

EXAMPLES = 256
"""That are looked at, spread over the data."""

TOKENS = 4096
"""Of them, as many of each."""

PER_FEATURE = 2
"""Tokens for each feature of a state, where directions are looked for."""


@torch.no_grad()
def framed(capture: Capture, source: Source) -> dict[int, Frame]:
    """The frame of each kept layer.

    Raises:
        InputError: If there are too few tokens to find directions among, or states that are no
            numbers.
    """
    kept = capture.layers
    if kept is None:
        return {}
    width = kept.width if kept.projected else None
    seen: dict[int, list[Tensor]] = {layer: [] for layer in kept.layers}
    split = next(iter(capture.named))
    tokens = capture.tokens(split)
    there = [place for place, count in enumerate(tokens) if count]
    chosen = there[:: max(1, len(there) // EXAMPLES)]
    most = TOKENS if width is None else max(TOKENS, PER_FEATURE * kept.features)
    each = max(1, -(-most // max(len(chosen), 1)))
    size = capture.args.eval_batch_size
    shown = not capture.args.disable_tqdm
    console = Console(stderr=True)
    starts = track(
        range(0, len(chosen), size),
        "measuring hidden states",
        console=console,
        transient=True,
        disable=not shown,
    )
    for start in starts:
        places = chosen[start : start + size]
        batch = batch_of(capture, split, places)
        every = states_of(capture, batch, source(batch.for_teacher))
        for place, own in zip(places, every, strict=True):
            for layer, states in own.items():
                if not states.isfinite().all():  # a median of NaN would blame all examples
                    raise InputError(
                        f"example {place}: hidden state {layer} of the teacher: numbers that are "
                        "not finite have no code; leave it out, or states: false"
                    )
                seen[layer].append(states[_spread(len(states), each)].float().cpu())
    found = {layer: torch.cat(parts) for layer, parts in seen.items()}
    count = len(next(iter(found.values())))
    if width is not None and count < width:
        raise InputError(
            f"Cached: states_width is {width}, and {count:,} tokens of the {split} data are too "
            "few to find so many directions among; write less, or leave it out"
        )
    return {layer: Frame.of(states, width) for layer, states in found.items()}


def _spread(count: int, most: int) -> Tensor:
    """At most so many places of some, from all of them alike.

    >>> _spread(10, 4)
    tensor([0, 2, 5, 7])
    """
    return torch.arange(min(count, most)) * count // max(min(count, most), 1)
