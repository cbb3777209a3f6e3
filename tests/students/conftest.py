"""What the tests of students share."""

from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.fixture
def config() -> PreTrainedConfig:
    """A teacher's."""
    return LlamaConfig(vocab_size=100, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
