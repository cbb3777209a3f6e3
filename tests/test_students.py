"""Students: from a config with a seed, from an id or path, or loaded; dtypes and what is shared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from llm_distill import FromConfig, Local
from llm_distill.capture import head_of, plain
from llm_distill.errors import InputError
from llm_distill.signals import ModelSpec
from llm_distill.students import (
    head_name,
    load_student,
    refuse_adapted_head,
    student_spec,
)
from tests import tiny

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


class TestLoadStudent:
    def test_a_loaded_model_is_taken_as_it_is(self, student: PreTrainedModel) -> None:
        assert load_student(student, student.config) is student

    def test_masters_are_fp32_and_teachers_as_saved(self, tmp_path: Path) -> None:
        tiny.llama("student").bfloat16().save_pretrained(tmp_path)
        config = tiny.llama("teacher").config
        assert load_student(str(tmp_path), config).dtype is torch.float32
        assert load_student(Local(str(tmp_path)), config).dtype is torch.float32
        spec = Local(str(tmp_path), dtype="bfloat16")
        assert load_student(spec, config).dtype is torch.bfloat16
        assert Local(str(tmp_path)).load().dtype is torch.bfloat16

    def test_revision_and_trust_are_each_models_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny.llama("student").save_pretrained(tmp_path)
        seen: list[dict[str, Any]] = []

        def record(name: str, **options: Any) -> LlamaForCausalLM:
            seen.append({"name": name, **options})
            return tiny.llama("student")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
        config = LlamaConfig()
        load_student(Local(str(tmp_path), revision="v1", trust_remote_code=True), config)
        load_student(str(tmp_path), config)
        assert (seen[0]["revision"], seen[0]["trust_remote_code"]) == ("v1", True)
        assert "revision" not in seen[1]
        assert seen[1]["trust_remote_code"] is False


class TestSpec:
    def test_it_is_known_without_weights(self, config: PreTrainedConfig, tmp_path: Path) -> None:
        tiny.llama("student").config.save_pretrained(tmp_path)
        expected = {"depth": 2, "width": 32, "heads": 4}
        for student in (FromConfig("llama", SMALL), str(tmp_path), tiny.llama("student")):
            spec = student_spec(student, config)
            assert isinstance(spec, ModelSpec)
            assert {key: getattr(spec, key) for key in expected} == expected

    def test_its_name(self, config: PreTrainedConfig) -> None:
        assert student_spec(FromConfig("llama", SMALL), config).name == "FromConfig(llama)"
        assert student_spec(tiny.llama("student"), config).name == "LlamaForCausalLM"


class TestAdaptedHeads:
    """An adapter on the head is found from names alone."""

    @pytest.mark.parametrize(
        ("options", "refused"),
        [
            ({"target_modules": ["q_proj", "lm_head"]}, True),
            ({"target_modules": "lm_head"}, True),
            ({"target_modules": r".*(q_proj|lm_head)"}, True),
            ({"target_parameters": ["lm_head.weight"]}, True),
            ({"target_modules": ["q_proj"]}, False),
            ({"target_modules": "all-linear"}, False),  # PEFT leaves the head out
            ({"target_modules": ["head"]}, False),
            ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
            ({"target_modules": r".*", "exclude_modules": ["lm_head"]}, False),
            ({"target_parameters": ["q_proj.weight"]}, False),
            ({}, False),  # PEFT's own choice
        ],
    )
    @pytest.mark.parametrize("kind", ["path", "loaded", "random"])
    def test_by_any_way_of_naming_it(
        self, kind: str, options: dict[str, Any], refused: bool, tmp_path: Path
    ) -> None:
        tiny.llama("student").config.save_pretrained(tmp_path)
        students: dict[str, Any] = {
            "path": str(tmp_path),
            "loaded": tiny.llama("student"),
            "random": FromConfig("llama", SMALL),
        }
        given = students[kind], tiny.llama("teacher").config, LoraConfig(**options)
        if not refused:
            refuse_adapted_head(*given)
            return
        with pytest.raises(InputError, match="take lm_head out of target_modules, or write mod"):
            refuse_adapted_head(*given)

    @pytest.mark.parametrize(("family", "name"), [("gpt2", "lm_head"), ("bert", "decoder")])
    def test_whatever_the_head_is_called(self, family: str, name: str, tmp_path: Path) -> None:
        model = tiny.bert() if family == "bert" else tiny.gpt2()
        model.config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"would sit on .*{name}, the student's language-mode"):
            refuse_adapted_head(str(tmp_path), model.config, LoraConfig(target_modules=[name]))

    def test_what_peft_does_agrees(self) -> None:
        """The model that a refused adapter would have made has no plain head."""
        made = get_peft_model(tiny.llama("student"), LoraConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="take the head out of target_modules"):
            head_of(plain(made))

    def test_none_and_prompts(self) -> None:
        student, teacher = tiny.llama("student"), tiny.llama("teacher").config
        refuse_adapted_head(student, teacher, None)
        prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        refuse_adapted_head(student, teacher, prompts)

    def test_a_class_that_is_not_transformers_own_is_left_to_its_weights(self) -> None:
        class Own(LlamaConfig):
            model_type = "own_llama"

        class Spec(Local):
            @property
            def config(self) -> Any:
                return Own(**SMALL)

        assert head_name(Spec("me/own"), Own(**SMALL)) is None
