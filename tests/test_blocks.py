"""Where the blocks of a model are, and models where they are not to be found."""

import pytest
from transformers import AlbertConfig, AlbertForMaskedLM, XLMConfig, XLMWithLMHeadModel

from llm_distill.blocks import find
from llm_distill.errors import InputError
from tests.students.families import FAMILIES


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("bert", "bert.encoder.layer"),
        ("mixtral", "model.layers"),
        ("gemma3 composite", "model.language_model.layers"),
    ],
)
def test_blocks_by_their_number(family: str, path: str) -> None:
    assert find(FAMILIES[family]()) == path


def test_blocks_that_share_weights() -> None:
    config = AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_attention_heads=2,
        intermediate_size=8, num_hidden_layers=4,
    )  # fmt: skip
    message = "the 4 blocks of AlbertForMaskedLM are not to be found; .* there is none; write"
    with pytest.raises(InputError, match=message):
        find(AlbertForMaskedLM(config))


def test_blocks_in_pieces() -> None:
    config = XLMConfig(vocab_size=20, emb_dim=8, n_layers=3, n_heads=2)
    message = "blocks of XLMWithLMHeadModel are not to be found; .* there are 4, transformer.at"
    with pytest.raises(InputError, match=message):
        find(XLMWithLMHeadModel(config))
