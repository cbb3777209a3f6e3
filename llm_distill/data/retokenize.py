"""`Retokenizer`: sequences of one tokenizer's tokens as a batch of another's, the text the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_distill.data.collate import Collator
from llm_distill.data.encode import IGNORE, tokenize, with_end

CUT = "\ufffd"
"""What half a character becomes, where a sequence was cut inside of one."""


@dataclass(frozen=True, kw_only=True)
class Retokenizer:
    """A collator that reads sequences as text and writes that in other tokens.

    Special tokens are not part of the text: the other tokenizer adds its own, an end of sequence
    where the sequence had one. A sequence without text becomes one without real tokens.

    Args:
        ours: Of the sequences it is given.
        theirs: Of those it makes.
        positions: Tokens a sequence may have then, the rest is cut; None: any number.
    """

    ours: PreTrainedTokenizerBase
    theirs: PreTrainedTokenizerBase
    positions: int | None = None

    def __call__(self, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
        """Make a batch in which nothing is supervised: B times `[T_b] -> [B, T']`.

        Args:
            sequences: The real tokens of each.
        """
        ids = [sequence.tolist() for sequence in sequences]
        texts = [self._text(tokens) for tokens in ids]
        encoded = tokenize(self.theirs, texts)
        collator = Collator.of(self.theirs)
        examples = [
            self._example(text, theirs, collator.pad_token_id, ended=self._ended(ours))
            for text, ours, theirs in zip(texts, ids, encoded, strict=True)
        ]
        return collator(examples)

    def _text(self, ids: list[int]) -> str:
        """What a sequence says."""
        text = self.ours.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip(CUT)

    def _ended(self, ids: list[int]) -> bool:
        """Whether a sequence has an end, rather than being cut."""
        return ids[-1:] == [self.ours.eos_token_id]

    def _example(self, text: str, ids: list[int], pad: int, *, ended: bool) -> dict[str, list[int]]:
        """What the collator pads."""
        if not text:  # the special tokens alone say nothing of it
            return {"input_ids": [pad], "attention_mask": [0], "labels": [IGNORE]}
        kept = (with_end(ids, self.theirs) if ended else ids)[: self.positions]
        return {"input_ids": kept, "labels": [IGNORE] * len(kept)}
