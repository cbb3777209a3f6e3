"""`Collator`: examples of different lengths to one batch of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from llm_distill.data.encode import IGNORE
from llm_distill.errors import InputError

_LONG = torch.long


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads ``input_ids`` and ``labels``, and makes the ``attention_mask`` of their lengths.

    The mask comes from the lengths and never from the ids, so that a pad token which is also the
    end of sequence hides no real end. Columns other than these three are ignored.

    Args:
        pad_token_id: What stands in ``input_ids`` where nothing is; any id will do.
        padding_side: ``right`` or ``left``.
        pad_to_multiple_of: Round the length of a batch up to a multiple, in tokens.

    Example:
        >>> batch = Collator(pad_token_id=0)([{"input_ids": [5, 6]}, {"input_ids": [7]}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
        >>> batch["labels"].tolist()
        [[5, 6], [7, -100]]
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        """Check the side."""
        if self.padding_side not in ("right", "left"):
            raise InputError(f"padding_side: '{self.padding_side}'; write 'right' or 'left'")

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, *, pad_to_multiple_of: int | None = None
    ) -> Self:
        """Pad as the tokenizer does; with its end of sequence, or id 0, where it has no pad."""
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return cls(
            pad_token_id=next((int(token) for token in known if token is not None), 0),
            padding_side=tokenizer.padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def __call__(self, examples: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Make a batch, every tensor [B, T].

        Args:
            examples: Each with ``input_ids`` and, unless every token is supervised, ``labels``.
                An ``attention_mask`` of the example's own is kept, and a position that it hides
                is not supervised.
        """
        rows = [_tensors(example) for example in examples]
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE}
        return {
            name: torch.stack([self._pad(row[name], length, fill) for row in rows])
            for name, fill in fills.items()
        }

    def _pad(self, row: Tensor, length: int, fill: int) -> Tensor:
        missing = length - len(row)
        return pad(row, (missing, 0) if self.padding_side == "left" else (0, missing), value=fill)


def _tensors(example: Mapping[str, object]) -> dict[str, Tensor]:
    ids = torch.as_tensor(example["input_ids"], dtype=_LONG)
    given = example.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else torch.as_tensor(given, dtype=_LONG)
    labels = torch.as_tensor(example.get("labels", ids), dtype=_LONG)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, IGNORE),
    }
