"""Any collator's batch, and its rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llm_distill.collation import RowCollator, first_batch
from llm_distill.data import Collator
from llm_distill.data.retokenize import Retokenizer
from llm_distill.errors import InputError
from llm_distill.rows import example_keys, supervised_rows
from tests import on_disk
from tests.test_rows import SEQUENCES, Side, batch, said


def collator(
    side: Side, *, shift: bool = True, valid: bool = False, **extra: Tensor
) -> RowCollator:
    ids, mask, labels = batch(side)
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels, **extra}
    return RowCollator(lambda examples: dict(made), shift=shift, valid=valid)


@pytest.mark.parametrize("shift", [True, False])
def test_the_collator_adds_rows_and_keys(shift: bool) -> None:
    made = collator("right", shift=shift)([])
    ids, mask, labels = batch("right")
    assert said(made["rows"]) == said(supervised_rows(ids, mask, labels, shift=shift))
    assert made["keys"] == example_keys(ids, mask)
    assert made["valid"] is None
    assert torch.equal(made["labels"], labels)
    assert "position_ids" not in made


def test_the_collator_adds_valid_rows_where_asked() -> None:
    assert collator("right", valid=True)([])["valid"].per_sequence == (5, 2, 7)


def test_left_padding_counts_positions_from_the_first_real_token() -> None:
    positions = collator("left")([])["position_ids"]
    for row, sequence in zip(positions, SEQUENCES, strict=True):
        length = len(sequence)
        assert row[-length:].tolist() == list(range(length))
        assert not row[:-length].any()


def test_positions_of_the_inner_collator_are_kept() -> None:
    own = torch.arange(21).view(3, 7)
    assert torch.equal(collator("left", position_ids=own)([])["position_ids"], own)


def test_the_collator_needs_no_mask() -> None:
    ids = torch.tensor([[5, 6, 7]])
    inner = RowCollator(lambda examples: {"input_ids": ids, "labels": ids}, shift=True, valid=True)
    made = inner([])
    assert len(made["rows"]) == 2
    assert len(made["valid"]) == 3
    assert "position_ids" not in made


def test_the_collator_does_not_write_into_what_it_was_given() -> None:
    ids = torch.tensor([[5, 6, 7]])
    given = {"input_ids": ids, "labels": ids}
    RowCollator(lambda examples: given, shift=True, valid=False)([])
    assert set(given) == {"input_ids", "labels"}


def test_a_collator_without_labels_is_refused() -> None:
    inner = RowCollator(
        lambda examples: {"input_ids": torch.tensor([[5, 6]])}, shift=True, valid=False
    )
    with pytest.raises(
        ValueError, match=r"gave \['input_ids'\] but no `labels`.*copy of input_ids"
    ):
        inner([])


def test_batches_longer_than_the_positions_are_refused() -> None:
    """Rotary models would go on silently, absolute ones fail with an index error."""
    ids = torch.ones(2, 9, dtype=torch.long)
    made = {"input_ids": ids, "labels": ids}
    RowCollator(lambda examples: dict(made), shift=True, valid=False, positions=9)([])
    short = RowCollator(lambda examples: dict(made), shift=True, valid=False, positions=8)
    with pytest.raises(InputError, match="9 tokens long and the models have 8 positions"):
        short([])
    made["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    assert len(short([])["rows"])  # of examples that are packed, each is short enough
    made["position_ids"] = torch.arange(9)[None].repeat(2, 1)
    with pytest.raises(InputError, match="a sequence is 9 tokens long"):
        short([])


MASKED: dict[str, list[int]] = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
SUPERVISED: dict[str, list[int]] = {"input_ids": [5, 8], "labels": [-100, 8]}


class TestFirstBatch:
    COLLATOR = RowCollator(Collator(pad_token_id=0), shift=True, valid=True)

    def test_it_goes_on_to_the_first_example_with_a_row_and_no_further(self) -> None:
        examples = iter([MASKED, MASKED, SUPERVISED, MASKED])
        batch = first_batch(self.COLLATOR, examples, rows_needed=True)
        assert batch is not None
        assert batch["input_ids"].tolist() == [[5, 8]]
        assert list(examples) == [MASKED]

    def test_all_masked_is_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"0 supervised tokens in the first 3 .* is -100; leave"
        ):
            first_batch(self.COLLATOR, [MASKED] * 3, rows_needed=True)

    def test_valid_tokens_need_no_label(self) -> None:
        batch = first_batch(self.COLLATOR, [MASKED, SUPERVISED], rows_needed=False)
        assert batch is not None
        assert batch["input_ids"].shape == (1, 3)

    def test_without_examples_there_is_nothing_to_say(self) -> None:
        assert first_batch(self.COLLATOR, [], rows_needed=True) is None


class TestTheirs:
    """The teacher's own batch, where its tokenizer is another."""

    OURS, THEIRS = on_disk.tokenizer(), on_disk.foreign("left")
    TEXTS = ("the cat sat on the mat", "", "a dog")

    def made(self, side: str) -> dict[str, Any]:
        retell = Retokenizer(ours=self.OURS, theirs=self.THEIRS)
        own = RowCollator(
            Collator(pad_token_id=0, padding_side=side),
            shift=True,
            valid=True,
            theirs=RowCollator(retell, shift=True, valid=True),
        )
        ids = [[*self.OURS(text).input_ids, self.OURS.eos_token_id] for text in self.TEXTS]
        return own([{"input_ids": tokens} for tokens in ids])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_it_has_the_same_sequences_and_rows_of_its_own(self, side: str) -> None:
        made = self.made(side)
        theirs = made["theirs"]
        texts = [[*self.THEIRS(text).input_ids, 0] if text else [] for text in self.TEXTS]
        assert theirs["valid"].per_sequence == tuple(map(len, texts))
        assert theirs["valid"].token.tolist() == [token for text in texts for token in text]
        assert theirs["rows"].per_sequence == (0, 0, 0)
        assert len(made["valid"].per_sequence) == 3
        assert made["valid"].per_sequence != theirs["valid"].per_sequence
        assert theirs["keys"] != made["keys"]

    def test_its_padding_is_its_own(self) -> None:
        """The teacher's is on the left, so that its positions count from the first real token."""
        theirs = self.made("right")["theirs"]
        assert theirs["attention_mask"][2].tolist() == sorted(theirs["attention_mask"][2].tolist())
        first = int(theirs["attention_mask"][2].argmax())
        assert theirs["position_ids"][2, first:].tolist() == list(
            range(theirs["input_ids"].shape[1] - first)
        )
        assert "position_ids" not in self.made("right")

    def test_a_batch_without_a_mask_is_all_text(self) -> None:
        ids = torch.tensor([self.OURS("the cat").input_ids])
        retell = RowCollator(
            Retokenizer(ours=self.OURS, theirs=self.THEIRS), shift=True, valid=True
        )
        given = {"input_ids": ids, "labels": ids}
        made = RowCollator(lambda examples: given, shift=True, valid=True, theirs=retell)([])
        assert made["theirs"]["input_ids"].tolist() == [self.THEIRS("the cat").input_ids]

    def test_nothing_is_made_where_nobody_asks(self) -> None:
        assert "theirs" not in collator("right")([])

    def test_columns_are_those_of_the_sequences(self) -> None:
        retell = Retokenizer(ours=self.OURS, theirs=self.THEIRS)
        own = RowCollator(
            Collator(pad_token_id=0),
            shift=True,
            valid=True,
            theirs=RowCollator(retell, shift=True, valid=True),
            columns=("kind",),
        )
        made = own([{"input_ids": self.OURS(text).input_ids, "kind": 1} for text in ("a dog", "a")])
        assert made["columns"] == made["theirs"]["columns"] == {"kind": ("1", "1")}


class TestColumns:
    """What travels beside the batch."""

    def test_the_inner_collator_does_not_see_them(self) -> None:
        seen: list[Any] = []

        def inner(examples: list[Any]) -> dict[str, Tensor]:
            seen.extend(examples)
            return Collator(pad_token_id=0)(examples)

        rows = [{"input_ids": [5, 6], "kind": "a", "n": 3}, {"input_ids": [7], "kind": "b", "n": 4}]
        made = RowCollator(inner, shift=True, valid=False, columns=("kind", "n"))(rows)
        assert made["columns"] == {"kind": ("a", "b"), "n": ("3", "4")}
        assert [sorted(example) for example in seen] == [["input_ids"], ["input_ids"]]
        assert "columns" not in RowCollator(inner, shift=True, valid=False)(rows)

    @pytest.mark.parametrize(
        ("example", "there"), [({"input_ids": [5]}, r"\['input_ids'\]"), ([5], "no names")]
    )
    def test_an_example_without_one_is_refused(self, example: Any, there: str) -> None:
        collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=False, columns=("kind",))
        with pytest.raises(InputError, match=f"no column 'kind', which names .*; it has {there}"):
            collate([example])
