"""Collating: any collator's batch, with the rows of it beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_distill.errors import InputError
from llm_distill.rows import example_keys, supervised_rows, valid_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowCollator:
    """Any collator, plus `rows`, `valid` and `keys` beside what it makes.

    Attributes:
        collator: Makes `input_ids`, `labels` and usually `attention_mask`.
        shift: Whether the models are causal.
        valid: Whether any term asks for all real tokens.
        positions: Tokens a sequence may have: the fewer of both models'; None: not known.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    shift: bool
    valid: bool
    positions: int | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate examples.

        Raises:
            ValueError: If the inner collator gives no `labels`.
        """
        batch = dict(self.collator(examples))
        if "labels" not in batch:
            raise ValueError(
                f"the data collator gave {sorted(batch)} but no `labels`; llm_distill needs labels "
                "to know which positions are supervised (a copy of input_ids, -100 elsewhere)"
            )
        ids: Tensor = batch["input_ids"]
        mask: Tensor | None = batch.get("attention_mask")
        self._check_length(ids.shape[1])
        batch["rows"] = supervised_rows(ids, mask, batch["labels"], shift=self.shift)
        batch["valid"] = valid_rows(ids, mask) if self.valid else None
        batch["keys"] = example_keys(ids, mask)
        if self.shift and mask is not None and "position_ids" not in batch and _padded_left(mask):
            batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        return batch

    def _check_length(self, length: int) -> None:
        """Refuse what a model has no positions for; rotary ones would go on silently."""
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"a batch is {length} tokens long and the models have {self.positions} positions; "
                "cut the sequences, or give a dataset of `datasets`, which is cut here"
            )


def _padded_left(mask: Tensor) -> bool:
    """Whether a sequence starts with padding: models count positions from the first column."""
    return bool((mask[:, 0] == 0).any())
