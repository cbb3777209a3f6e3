"""Configs with fewer blocks, and families whose blocks are not alone."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GPT2LMHeadModel,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from llm_distill.blocks import find
from llm_distill.errors import InputError
from llm_distill.students.blocks import cut, matching
from tests import tiny
from tests.students.families import DEPTH, FAMILIES


class TestCut:
    def test_lists_of_other_things_stay(self) -> None:
        config = LlamaConfig(num_hidden_layers=4, eos_token_id=[1, 2, 3, 4])
        assert cut(config, [1, 4]).eos_token_id == [1, 2, 3, 4]

    def test_the_original_stays(self) -> None:
        config = tiny.gemma3(depth=4).config
        before = config.to_dict()
        cut(config, [1, 2])
        assert config.to_dict() == before

    def test_windows_that_begin_at_a_number(self) -> None:
        config = Qwen3Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2)
        made = cut(config, [1, 3])
        assert made.layer_types == ["full_attention", "sliding_attention"]
        again = type(made).from_dict(made.to_dict())
        assert again.layer_types == made.layer_types

    @pytest.mark.parametrize(
        ("step", "dense", "blocks", "left"),
        [
            (1, [], (1, 3), []),
            (1, [0, 2], (1, 2, 3), [0, 2]),
            (2, [], (1, 2, 4), [0]),
            (2, [3], (1, 2, 4), [0, 2]),
        ],
    )
    def test_blocks_without_experts(
        self, step: int, dense: list[int], blocks: tuple[int, ...], left: list[int]
    ) -> None:
        config = Qwen3MoeConfig(
            num_hidden_layers=4, decoder_sparse_step=step, mlp_only_layers=dense
        )
        made: Any = cut(config, blocks)
        assert (made.mlp_only_layers, made.decoder_sparse_step) == (left, 1)

    def test_experts_by_number_or_from_a_number_on(self) -> None:
        llama4: Any = cut(Llama4TextConfig(num_hidden_layers=4, moe_layers=[1, 3]), [1, 4])
        assert llama4.moe_layers == [1]
        deepseek: Any = cut(DeepseekV3Config(num_hidden_layers=6, first_k_dense_replace=3), [2, 6])
        assert deepseek.first_k_dense_replace == 1


def compared(kind: Any, config: PreTrainedConfig, blocks: tuple[int, ...]) -> str:
    return matching(kind, config, cut(config, blocks), blocks)


class TestMatching:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_choice_of_blocks_of_these_families_is_the_same(self, family: str) -> None:
        model = FAMILIES[family]()
        for blocks in ((1, 3, 5), (2, 4), (5,), tuple(range(1, DEPTH + 1))):
            assert compared(type(model), model.config, blocks) == find(model)

    def test_it_costs_no_memory_and_no_random_numbers(self) -> None:
        config = LlamaConfig(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        assert compared(LlamaForCausalLM, config, (1, 40, 80)) == "model.layers"
        assert torch.equal(torch.rand(3), expected)

    def test_a_block_whose_scale_depends_on_its_number(self) -> None:
        config = tiny.gpt2(depth=4).config
        config.scale_attn_by_inverse_layer_idx = True
        message = (
            r"GPT2LMHeadModel cannot be cut to these blocks; block 4 would be another one as "
            r"block 2: attn\.scaling differs; choose others"
        )
        with pytest.raises(InputError, match=message):
            compared(GPT2LMHeadModel, config, (1, 4))
        assert compared(GPT2LMHeadModel, config, (1, 2)) == "transformer.h"

    def test_what_a_config_does_not_say_again(self) -> None:
        """Read anew, the config would give other blocks: `layer_types` is lost on the way."""

        class Forgetful(type(tiny.gemma3().config)):  # type: ignore[misc]  # its class
            def to_dict(self) -> dict[str, Any]:
                return {k: v for k, v in super().to_dict().items() if k != "layer_types"}

        known = tiny.gemma3(depth=4).config
        config = Forgetful(**known.to_dict())
        with pytest.raises(InputError, match="block 4 would be another one as block 2: "):
            compared(type(tiny.gemma3()), config, (1, 4))

    def test_a_part_around_the_blocks_whose_shape_depends_on_their_number(self) -> None:
        class Wide(LlamaForCausalLM):
            def __init__(self, config: LlamaConfig) -> None:
                super().__init__(config)
                self.table = torch.nn.Embedding(4, config.num_hidden_layers)

        message = r"Wide cannot be cut .*; the shape of table\.weight depends on the number of bloc"
        with pytest.raises(InputError, match=message):
            compared(Wide, tiny.llama("teacher").config, (1, 4))

    def test_a_config_that_refuses_fewer_blocks(self) -> None:
        class Fixed(LlamaConfig):
            def __init__(self, **values: Any) -> None:
                if values.get("num_hidden_layers", 4) != 4:
                    raise ValueError("four blocks or none")
                super().__init__(**values)

        config = Fixed(**tiny.llama("teacher").config.to_dict())
        with pytest.raises(InputError, match="its config says: four blocks or none; choose others"):
            compared(LlamaForCausalLM, config, (1, 4))

    def test_another_part_or_class(self) -> None:
        class Odd(LlamaForCausalLM):
            def __init__(self, config: LlamaConfig) -> None:
                super().__init__(config)
                self.model.layers[-1].mlp = torch.nn.Identity()

        with pytest.raises(InputError, match="block 2 would be another one as block 2: mlp differ"):
            compared(Odd, copy.deepcopy(tiny.llama("teacher").config), (1, 2))
