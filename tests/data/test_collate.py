import re

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Collator
from llm_distill.errors import InputError

END = 1
EXAMPLES = [
    {"input_ids": [5, 6, END], "labels": [-100, 6, END]},
    {"input_ids": [7], "labels": [7]},
]


def test_right_padding() -> None:
    batch = Collator(pad_token_id=END)(EXAMPLES)
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert batch["input_ids"].tolist() == [[5, 6, END], [7, END, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, END], [7, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_left_padding() -> None:
    batch = Collator(pad_token_id=0, padding_side="left")(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, END], [0, 0, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, END], [-100, -100, 7]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pad_that_is_also_the_end_hides_no_real_end(side: str) -> None:
    batch = Collator(pad_token_id=END, padding_side=side)(
        [{"input_ids": [END, 5, END], "labels": [END, 5, END]}, {"input_ids": [END]}]
    )
    real = batch["attention_mask"].bool()
    assert real.sum(1).tolist() == [3, 1]
    assert batch["labels"][real].tolist() == [END, 5, END, END]
    assert (batch["labels"][~real] == -100).all()


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (3, 3), (4, 4), (8, 8)])
def test_the_length_is_rounded_up_to_a_multiple(multiple: int, length: int) -> None:
    batch = Collator(pad_token_id=0, pad_to_multiple_of=multiple)(EXAMPLES)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, length)}
    assert batch["attention_mask"].sum() == 4


def test_without_labels_every_real_token_is_supervised() -> None:
    batch = Collator(pad_token_id=0)([{"input_ids": [3, 4]}, {"input_ids": [5]}])
    assert batch["labels"].tolist() == [[3, 4], [5, -100]]


def test_an_examples_own_mask_is_kept_and_what_it_hides_is_not_supervised() -> None:
    batch = Collator(pad_token_id=0)(
        [{"input_ids": [3, 4, 9], "attention_mask": [1, 1, 0]}, {"input_ids": [5]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[3, 4, -100], [5, -100, -100]]


def test_other_columns_are_ignored_and_tensors_and_arrays_are_accepted() -> None:
    batch = Collator(pad_token_id=0)(
        [
            {"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([3, 4]), "text": "a"},
            {"input_ids": np.array([5], dtype=np.int32), "position_ids": [0]},
        ]
    )
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]]


def test_it_pads_as_the_tokenizer_does(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Collator.of(tokenizer) == Collator(pad_token_id=END, padding_side="right")
    left = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, padding_side="left", pad_token="<s>"
    )
    assert Collator.of(left, pad_to_multiple_of=8) == Collator(
        pad_token_id=0, padding_side="left", pad_to_multiple_of=8
    )


def test_without_a_pad_the_end_or_id_0_stands_in(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert Collator.of(ending).pad_token_id == END
    assert Collator.of(PreTrainedTokenizerFast(tokenizer_object=backend)).pad_token_id == 0


def test_a_side_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=re.escape("padding_side: 'up'; write 'right' or 'left'")):
        Collator(pad_token_id=0, padding_side="up")
