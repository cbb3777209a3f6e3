"""From sparse targets to columns of bytes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_distill.cache.levels import from_levels, to_levels
from llm_distill.cache.planes import join_ids, split_ids
from llm_distill.losses.sparse import Counts, TopK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.cache.encoded import Encoded

TOP = ("low", "step", "leap", "levels", "shape")
"""Columns of the likeliest tokens: ids, log-probabilities, and span and tail in fp16."""

DRAWN = ("drawn_low", "drawn_step", "drawn_leap", "counts")
"""Columns of drawn tokens: ids, and how often each was drawn."""

MOST_DRAWS = 255
"""Draws of a row that one byte can count."""

Bytes = NDArray[np.uint8]
Columns = dict[str, Bytes]


def of_top(top: TopK) -> Columns:
    """The likeliest tokens, by ascending id: `[N, K]`, and `shape` `[2, N]` in fp16."""
    order = top.ids.argsort(-1)
    ids = top.ids.gather(-1, order).cpu().numpy()
    log_probs = top.log_probs.gather(-1, order).double().cpu().numpy()
    levels, span, tail = to_levels(log_probs, top.tail.double().cpu().numpy())
    return {**split_ids(ids), "levels": levels, "shape": as_bytes(np.stack([span, tail]))}


def top_of(found: Encoded, k: int) -> TopK:
    """The likeliest tokens as they were kept."""
    span, tail = found.halves("shape", 2)
    ids = join_ids(*(found.table(name, k) for name in TOP[:3]))
    log_probs, outside = from_levels(found.table("levels", k), span, tail)
    return TopK(*(torch.from_numpy(a) for a in (ids, log_probs, outside)))


def together(parts: Sequence[TopK]) -> TopK:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    ids, log_probs, tail = ([vars(part)[name] for part in parts] for name in vars(parts[0]))
    return TopK(torch.cat(ids), torch.cat(log_probs), torch.cat(tail))


def of_drawn(drawn: Counts) -> Columns:
    """Drawn tokens, by ascending id: `[N, K]` each."""
    # Rows with fewer tokens than others are filled with their last one, which keeps the order.
    last = drawn.ids.amax(-1, keepdim=True)
    ids = torch.where(drawn.counts == 0, last, drawn.ids).cpu().numpy()
    planes = {f"drawn_{name}": plane for name, plane in split_ids(ids).items()}
    return {**planes, "counts": drawn.counts.cpu().numpy().astype(np.uint8)}


def drawn_of(found: Encoded, draws: int) -> Counts:
    """Drawn tokens as they were kept."""
    ids = join_ids(*(found.table(name, found.width) for name in DRAWN[:3]))
    counts = found.table("counts", found.width).astype(np.int64)
    return Counts(torch.from_numpy(ids), torch.from_numpy(counts), draws)


def joined(parts: Sequence[Counts]) -> Counts:
    """Rows one after the other; narrow ones are filled up with tokens that count nothing."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.ids.shape[1] for part in parts)
    ids = [_filled(part.ids, width) for part in parts]
    counts = [_filled(part.counts, width, empty=True) for part in parts]
    return Counts(torch.cat(ids), torch.cat(counts), parts[0].draws)


def of_states(states: Tensor) -> NDArray[np.uint8]:
    """Numbers of any dtype as planes of their bytes, exact: `[N, D] -> [bytes, N * D]`.

    The bytes with the exponents resemble each other, those of the mantissas are noise; apart, a
    compressor finds the first.
    """
    raw = states.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(raw.reshape(-1, states.element_size()).T)


def states_of(raw: NDArray[np.uint8], rows: int, dtype: torch.dtype) -> Tensor:
    """What `of_states` took apart: `[bytes, N * D] -> [N, D]`."""
    planes = raw.reshape(dtype.itemsize, -1)
    # A shift for each plane takes a fraction of the time of a transposition.
    whole = planes[-1].astype(f"<u{dtype.itemsize}")
    for plane in planes[-2::-1]:
        whole <<= 8
        whole |= plane
    return torch.from_numpy(whole).view(dtype).reshape(rows, -1)


def as_bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The bytes of an array."""
    return np.ascontiguousarray(values).view(np.uint8)


def _filled(table: Tensor, width: int, *, empty: bool = False) -> Tensor:
    """A table as wide as others: its last column repeated, or zeros."""
    missing = width - table.shape[1]
    if not missing:
        return table
    last = table[:, -1:].expand(-1, missing)
    return torch.cat([table, torch.zeros_like(last) if empty else last], 1)
