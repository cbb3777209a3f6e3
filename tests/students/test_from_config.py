"""Students with random weights: from a config with a seed; what is shared with the teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from llm_distill import FromConfig
from llm_distill.errors import InputError
from llm_distill.provenance import Provenance
from tests import tiny
from tests.students.conftest import SMALL


class TestResolve:
    def test_an_architecture_with_changes(self, config: PreTrainedConfig) -> None:
        made = FromConfig("llama", SMALL).resolve(config)
        assert isinstance(made, LlamaConfig)
        assert {key: getattr(made, key) for key in SMALL} == SMALL
        assert made.head_dim == 8

    def test_vocabulary_and_special_tokens_are_the_teachers(self, config: PreTrainedConfig) -> None:
        made = FromConfig("gemma3_text", SMALL).resolve(config)
        assert made.vocab_size == 100
        assert made.bos_token_id == 1
        assert made.eos_token_id == [2, 3]
        # Gemma's own pad token 0 is another token in this vocabulary.
        assert made.pad_token_id is None

    def test_what_is_written_wins(self, config: PreTrainedConfig) -> None:
        made = FromConfig("llama", {**SMALL, "vocab_size": 128, "pad_token_id": 5}).resolve(config)
        assert (made.vocab_size, made.pad_token_id, made.bos_token_id) == (128, 5, 1)

    def test_a_path_is_the_base(self, config: PreTrainedConfig, tmp_path: Path) -> None:
        GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=24, n_head=3)).save_pretrained(tmp_path)
        made = FromConfig(str(tmp_path), {"num_hidden_layers": 1}).resolve(config)
        assert isinstance(made, GPT2Config)
        assert (made.n_layer, made.n_embd, made.n_head, made.vocab_size) == (1, 24, 3, 100)
        assert not made.name_or_path

    def test_random_weights_come_from_no_block(
        self, config: PreTrainedConfig, tmp_path: Path
    ) -> None:
        base = LlamaConfig(**SMALL)
        Provenance((1, 4), 4, "teacher").write(base)
        base.save_pretrained(tmp_path)
        assert Provenance.read(FromConfig(str(tmp_path), {}).resolve(config)) is None

    def test_kinds_of_blocks_follow_their_number(
        self, config: PreTrainedConfig, tmp_path: Path
    ) -> None:
        tiny.gemma3(depth=4).save_pretrained(tmp_path)
        made = FromConfig(str(tmp_path), {"num_hidden_layers": 3}).resolve(config)
        assert len(made.layer_types or ()) == 3

    @pytest.mark.parametrize(
        ("heads", "shared"), [(4, 1), (16, 4), (6, 6)], ids=["fewer", "more", "does not divide"]
    )
    def test_key_heads_keep_their_share(
        self, heads: int, shared: int, config: PreTrainedConfig, tmp_path: Path
    ) -> None:
        base = LlamaConfig(hidden_size=96, num_attention_heads=8, num_key_value_heads=2)
        base.save_pretrained(tmp_path)
        made = FromConfig(str(tmp_path), {"num_attention_heads": heads}).resolve(config)
        assert made.num_key_value_heads == shared
        assert made.head_dim == 96 // heads

    def test_a_width_of_heads_of_its_own_stays(
        self, config: PreTrainedConfig, tmp_path: Path
    ) -> None:
        Qwen3Config(hidden_size=64, num_attention_heads=8, head_dim=16).save_pretrained(tmp_path)
        made = FromConfig(str(tmp_path), {"hidden_size": 32}).resolve(config)
        assert (made.hidden_size, made.head_dim) == (32, 16)

    def test_qwen_with_few_heads_runs(self) -> None:
        # Its config has 32 key heads by default, whatever the number of heads.
        teacher = LlamaConfig(vocab_size=100)
        model = FromConfig("qwen3", {**SMALL, "head_dim": 8}).load(teacher)
        assert model(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, 100)

    @pytest.mark.parametrize(
        ("architecture", "changes", "message"),
        [
            ("llama", {"hiden_size": 3}, "llama has no 'hiden_size' in its config; did you mean "),
            ("gpt2", {"num_hiden_layers": 3}, "did you mean 'num_hidden_layers'"),
            ("llama", {"save_pretrained": 3}, "llama has no 'save_pretrained'"),
            ("llama", {"hidden_size": "wide"}, r"FromConfig\(llama\): .*expected int, got str"),
            ("llama", {"hidden_size": 30}, r"hidden size \(30\) is not a multiple"),
            ("llma", {}, "'llma' is no architecture of transformers.*did you mean 'llama'"),
            ("gemma3", {}, "'gemma3' is more than a language model.*'gemma3_text'"),
            ("bert", {}, "bert sees the tokens that it should predict; write is_decoder: true"),
            ("distilbert", {}, "distilbert has no causal language model, and the teacher is one"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, architecture: str, changes: dict[str, Any], message: str, config: PreTrainedConfig
    ) -> None:
        with pytest.raises(InputError, match=message):
            FromConfig(architecture, changes).resolve(config)

    def test_a_causal_student_of_a_masked_teacher_is_refused(self) -> None:
        with pytest.raises(InputError, match="llama has no masked language model, and the teacher"):
            FromConfig("llama", SMALL).resolve(BertConfig())


class TestLoad:
    def test_one_seed_gives_one_model_whatever_ran_before(self, config: PreTrainedConfig) -> None:
        torch.manual_seed(1)
        first = FromConfig("llama", SMALL, seed=3).load(config).state_dict()
        torch.manual_seed(2)
        again = FromConfig("llama", SMALL, seed=3).load(config).state_dict()
        other = FromConfig("llama", SMALL, seed=4).load(config).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

    def test_the_random_numbers_of_others_stay_as_they_are(self, config: PreTrainedConfig) -> None:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        FromConfig("llama", SMALL).load(config)
        assert torch.equal(torch.rand(3), expected)

    def test_its_dtype(self, config: PreTrainedConfig) -> None:
        assert FromConfig("llama", SMALL).load(config).dtype is torch.float32
        assert FromConfig("llama", SMALL, dtype="bfloat16").load(config).dtype is torch.bfloat16
        with pytest.raises(InputError, match="FromConfig: dtype is 'bf16'; write one of float32"):
            FromConfig("llama", SMALL, dtype="bf16")

    @pytest.mark.parametrize("saved", [True, False])
    def test_a_masked_teacher_gets_a_masked_student(self, saved: bool) -> None:
        teacher = tiny.bert().config
        teacher.architectures = ["BertForMaskedLM"] if saved else None
        model = FromConfig("bert", SMALL).load(teacher)
        assert isinstance(model, BertForMaskedLM)
        assert model.config.vocab_size == tiny.VOCABULARY

    def test_it_is_saved_as_a_plain_model(self, config: PreTrainedConfig, tmp_path: Path) -> None:
        FromConfig("llama", SMALL).load(config).save_pretrained(tmp_path)
        auto: Any = AutoModelForCausalLM
        model, told = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.use_cache
        assert model.generation_config.eos_token_id == [2, 3]
