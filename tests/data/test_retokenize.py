"""One text in two tokenizers' tokens."""

import pytest
import torch
from torch import Tensor

from llm_distill.data.retokenize import Retokenizer
from tests import on_disk

OURS, THEIRS = on_disk.tokenizer(), on_disk.foreign()
BEGIN, END, NONE = THEIRS.bos_token_id, THEIRS.eos_token_id, THEIRS.pad_token_id


def said(*texts: str, end: bool = True) -> list[Tensor]:
    """Texts in the student's tokens."""
    last = [OURS.eos_token_id] if end else []
    return [torch.tensor([*OURS(text).input_ids, *last]) for text in texts]


def retold(
    sequences: list[Tensor], *, positions: int | None = None, side: str = "right"
) -> dict[str, Tensor]:
    return Retokenizer(ours=OURS, theirs=on_disk.foreign(side), positions=positions)(sequences)


def real(batch: dict[str, Tensor]) -> list[list[int]]:
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_text_stays_and_the_tokens_are_the_others(side: str) -> None:
    texts = ["the cat sat", " a dog  of café\n", "zebras graze where lions doze"]
    batch = retold(said(*texts, end=False), side=side)
    assert real(batch) == [THEIRS(text).input_ids for text in texts]
    assert [THEIRS.decode(ids, skip_special_tokens=True) for ids in real(batch)] == texts
    assert [ids[0] for ids in real(batch)] == [BEGIN] * 3
    assert (batch["labels"] == -100).all()
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    edge = 0 if side == "left" else -1
    assert batch["input_ids"][:, edge].tolist().count(NONE) == 2
    assert any(len(ids) != len(given) for ids, given in zip(real(batch), said(*texts), strict=True))


def test_an_end_is_the_others_end_and_a_cut_sequence_has_none() -> None:
    ended, cut = real(retold([*said("the cat"), *said("the cat", end=False)]))
    assert ended == [*cut, END]


def test_other_special_tokens_are_not_text() -> None:
    start = torch.tensor([OURS.bos_token_id, OURS.pad_token_id])
    given = [torch.cat([start, said("the cat")[0]])]
    assert real(retold(given)) == real(retold(said("the cat")))


def test_what_has_no_position_is_cut() -> None:
    whole = real(retold(said("the cat sat on the mat", "the")))
    cut = real(retold(said("the cat sat on the mat", "the"), positions=6))
    assert [len(ids) for ids in cut] == [6, len(whole[1])]
    assert cut[0] == whole[0][:6]


@pytest.mark.parametrize("nothing", [[], [OURS.eos_token_id], [OURS.bos_token_id, 2]])
def test_a_sequence_without_text_has_no_real_token(nothing: list[int]) -> None:
    given = torch.tensor(nothing, dtype=torch.long)
    assert real(retold([given, *said("the cat")]))[0] == []
    alone = retold([given])
    assert alone["input_ids"].tolist() == [[NONE]]
    assert not alone["attention_mask"].any()


def test_half_a_character_is_no_text() -> None:
    """A sequence that was cut inside of one ends in bytes that are none."""
    whole = torch.tensor(OURS("the café").input_ids)
    assert real(retold([whole[:-1]])) == [THEIRS("the caf").input_ids]
    halves = torch.tensor(OURS("é").input_ids)
    assert real(retold([halves[:1]])) == [[]]
