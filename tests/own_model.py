"""A model whose code lies beside its weights: transformers knows no class and no plan for it.

Each block mixes in the mean of all tokens so far, and has a product of its own.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class OwnConfig(PreTrainedConfig):
    """Sizes."""

    model_type = "own"
    vocab_size: int = 128
    hidden_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4


class OwnBlock(nn.Module):
    """The mean of all tokens so far, a product, and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.product = nn.LayerNorm(width), nn.Linear(2 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        normed = self.norm(states)
        count = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
        found = self.product(torch.cat([normed, normed.cumsum(1) / count], -1)).tanh()
        mixed: Tensor = states + found
        return mixed


class OwnModel(PreTrainedModel):
    """Embedding and blocks."""

    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(
            OwnBlock(config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **given: Any) -> BaseModelOutput:
        del given
        states = self.words(input_ids)
        for block in self.stack:
            states = block(states)
        return BaseModelOutput(last_hidden_state=states)


class OwnForCausalLM(PreTrainedModel):
    """The same with a head."""

    config_class = OwnConfig
    base_model_prefix = "inner"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = OwnModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **given: Any) -> CausalLMOutput:
        states = self.inner(input_ids, **given).last_hidden_state
        return CausalLMOutput(logits=self.head(states))


def save(folder: Path) -> None:
    """Weights, and the code beside them."""
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig())
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    here = Path(__file__)
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    model.config.auto_map = {auto: f"{here.stem}.{name}" for auto, name in names.items()}
    model.save_pretrained(folder)
    shutil.copy(here, folder)
