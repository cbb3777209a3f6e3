"""Collating: any collator's batch, with the rows of it beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llm_distill.errors import InputError
from llm_distill.keys import Examples, name_examples
from llm_distill.rows import example_keys, supervised_rows, valid_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowCollator:
    """Any collator, plus `rows`, `valid`, `keys` and perhaps more beside what it makes.

    Attributes:
        collator: Makes `input_ids`, `labels` and usually `attention_mask`.
        shift: Whether the models are causal.
        valid: Whether any term asks for all real tokens.
        positions: Tokens a sequence may have: the fewer of both models'; None: not known.
        theirs: Makes the teacher's own batch of the real tokens of each sequence, where its
            tokenizer is another.
        named: Whether a cached teacher looks the examples up, by what they are.
        lookup: Does it here, in the process that collates.
        columns: Of the examples, kept as text beside the batch; the collator does not see them.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    shift: bool
    valid: bool
    positions: int | None = None
    theirs: RowCollator | None = None
    named: bool = False
    lookup: Callable[[Examples], Mapping[str, Any]] | None = None
    columns: tuple[str, ...] = ()

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate examples.

        Raises:
            ValueError: If the inner collator gives no `labels`, or an example lacks a column.
        """
        columns = self._columns(examples)
        if columns:
            examples = [{k: v for k, v in e.items() if k not in columns} for e in examples]
        batch = dict(self.collator(examples))
        if "labels" not in batch:
            raise ValueError(
                f"the data collator gave {sorted(batch)} but no `labels`; llm_distill needs labels "
                "to know which positions are supervised (a copy of input_ids, -100 elsewhere)"
            )
        ids: Tensor = batch["input_ids"]
        mask: Tensor | None = batch.get("attention_mask")
        self._check_length(ids, batch.get("position_ids"))
        batch["rows"] = supervised_rows(ids, mask, batch["labels"], shift=self.shift)
        batch["valid"] = valid_rows(ids, mask) if self.valid else None
        batch["keys"] = example_keys(ids, mask)
        batch |= self._known(batch)
        if self.shift and mask is not None and "position_ids" not in batch and _padded_left(mask):
            batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        if self.theirs is not None:
            batch["theirs"] = self.theirs(_real(ids, mask))
        for part in (batch, batch.get("theirs")):
            if columns and part is not None:
                part["columns"] = columns
        return batch

    def _known(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The examples' names where a cache wants them, and what it has of them."""
        if not self.named and self.lookup is None:
            return {}
        ids, rows = batch["input_ids"], batch["rows"]
        mask, places = batch.get("attention_mask"), batch.get("position_ids")
        examples = name_examples(ids, mask, places, (rows.sequence, rows.position))
        found = {} if self.lookup is None else self.lookup(examples)
        return {"examples": examples, **found}

    def _columns(self, examples: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """The kept columns, as text."""
        for name in self.columns:
            for example in examples:
                if not isinstance(example, Mapping) or name not in example:
                    there = sorted(example) if isinstance(example, Mapping) else "no names"
                    raise InputError(
                        f"an example has no column '{name}', which names its teacher; it has "
                        f"{there}: add the column, or write another in Routed: by"
                    )
        return {name: tuple(str(example[name]) for example in examples) for name in self.columns}

    def _check_length(self, ids: Tensor, places: Tensor | None) -> None:
        """Refuse what a model has no positions for; rotary ones would go on silently.

        Where examples are packed, positions start again with each.
        """
        length = ids.shape[1] if places is None or not places.numel() else int(places.max()) + 1
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"a sequence is {length} tokens long and the models have {self.positions} "
                "positions; cut it, or give a dataset of `datasets`, which is cut here"
            )


def first_batch(
    collator: RowCollator, examples: Iterable[Any], *, rows_needed: bool
) -> dict[str, Any] | None:
    """The first example that has a row, collated alone; None where there are no examples.

    Args:
        collator: May draw; the random numbers of others stay as they are.
        examples: As the collator takes them.
        rows_needed: Whether an example without a supervised token is of no use.

    Raises:
        InputError: For what the collator refuses, or if no example has a row.
    """
    looked = 0
    for example in examples:
        with torch.random.fork_rng(devices=[]):
            try:
                batch = collator([example])
            except ValueError as error:
                raise InputError(str(error)) from error
        if len(batch["rows"]) or not rows_needed:
            return batch
        looked += 1
    if not looked:
        return None
    raise InputError(
        f"0 supervised tokens in the first {looked:,} examples of train_dataset: every label is "
        "-100; leave `labels` out to supervise all tokens, or give a data_collator that sets them"
    )


def _real(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The real tokens of each sequence."""
    if mask is None:
        return list(ids)
    return [sequence[keep != 0] for sequence, keep in zip(ids, mask, strict=True)]


def _padded_left(mask: Tensor) -> bool:
    """Whether a sequence starts with padding: models count positions from the first column."""
    return bool((mask[:, 0] == 0).any())
