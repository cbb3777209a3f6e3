"""Configs found or refused with a way out, and teachers cut above what is asked of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
)
from transformers.utils import logging as hf_logging

from llm_distill import loading
from llm_distill.errors import InputError
from llm_distill.kinds import is_masked, sees_only_the_past
from llm_distill.rows import Batch, valid_rows
from llm_distill.signals import Request
from llm_distill.teachers import Local
from tests import on_disk, tiny

CPU = torch.device("cpu")


def small_bert(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(vocab_size=64, intermediate_size=16, **(sizes | changes))


class TestFolder:
    @pytest.mark.parametrize("name", ["/no/where", "./gone", "gone", "no id at all", "me/gone"])
    def test_what_is_not_here(self, name: str) -> None:
        assert loading.folder_of(name) is None

    def test_a_config_has_the_commit_of_its_folder(self, tmp_path: Path) -> None:
        there = tmp_path / "models--me--it" / "snapshots" / ("a" * 40)
        tiny.llama("student").save_pretrained(there)
        assert loading.load_config(str(there))._commit_hash == "a" * 40
        tiny.llama("student").save_pretrained(tmp_path / "it")
        assert loading.load_config(str(tmp_path / "it"))._commit_hash is None
        assert loading.folder_of(str(there)) == there


class TestLoadConfig:
    def test_a_missing_folder_names_those_beside_it(self, tmp_path: Path) -> None:
        for name in ("student", "teacher", ".cache"):
            (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=r"'.*studnet' is not a folder here; in .* 'student'"):
            loading.load_config(str(tmp_path / "studnet"))

    def test_where_nothing_is_alike_some_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "student").mkdir()
        with pytest.raises(InputError, match="there are 'student'") as caught:
            loading.load_config(str(tmp_path / "xyz"))
        assert ".cache" not in str(caught.value)

    def test_a_relative_path_with_one_slash_is_looked_for_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out" / "teacher").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=r"as a local folder or a Hub id: .*'teacher'"):
            loading.load_config("out/techer")

    def test_an_unreachable_hub_is_said(self) -> None:
        # conftest sets HF_HUB_OFFLINE.
        with pytest.raises(InputError, match=r"'nobody/nothing' cannot be read.*couldn't connect"):
            loading.load_config("nobody/nothing")

    def test_an_id_that_the_hub_does_not_know_is_said(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str, **_: Any) -> None:
            raise OSError(f"{name} is not a local folder and is not a valid model identifier\nIf …")

        monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
        with pytest.raises(InputError, match="not a valid model identifier") as caught:
            loading.load_config("nobody/nothing")
        assert "\n" not in str(caught.value)

    def test_a_folder_without_a_config_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot be read.*config\.json"):
            loading.load_config(str(tmp_path))

    def test_a_config_with_a_wrong_value_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
        with pytest.raises(InputError, match="expected int, got str"):
            loading.load_config(str(tmp_path))

    def test_encoder_decoders_are_refused(self, tmp_path: Path) -> None:
        T5Config(num_layers=1).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"is an encoder-decoder \(t5\); causal or masked"):
            loading.load_config(str(tmp_path))

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda: BertModel(small_bert()), "BertModel"),
            (lambda: BertForSequenceClassification(small_bert()), "BertForSequenceClassification"),
            (lambda: LlamaModel(tiny.llama("student").config), "LlamaModel"),
        ],
    )
    def test_models_without_a_language_model_head_are_refused(
        self, make: Callable[[], PreTrainedModel], name: str, tmp_path: Path
    ) -> None:
        make().save_pretrained(tmp_path)
        with pytest.raises(
            InputError, match=rf"saved as a {name}, which has no .* head; take .*ForCausalLM"
        ):
            loading.load_config(str(tmp_path))

    def test_a_bert_that_sees_what_it_should_predict_is_refused(self, tmp_path: Path) -> None:
        BertLMHeadModel(small_bert()).save_pretrained(tmp_path)
        with pytest.raises(
            InputError, match=r"BertLMHeadModel without is_decoder.*is_decoder: true"
        ):
            loading.load_config(str(tmp_path))

    @pytest.mark.parametrize(
        ("make", "masked"),
        [
            (lambda: BertForMaskedLM(small_bert()), True),
            (lambda: BertForPreTraining(small_bert()), True),
            (lambda: BertLMHeadModel(small_bert(is_decoder=True)), False),
            (lambda: tiny.llama("student"), False),
            (tiny.gpt2, False),
            (tiny.gemma3, False),
        ],
    )
    def test_language_models_are_accepted_and_their_kind_is_known(
        self, make: Callable[[], PreTrainedModel], masked: bool, tmp_path: Path
    ) -> None:
        model = make()
        model.save_pretrained(tmp_path)
        config = loading.load_config(str(tmp_path))
        assert is_masked(config) is masked
        assert sees_only_the_past(config) is not masked
        config.architectures = None  # as of a model that was never saved
        assert is_masked(config) is masked

    def test_custom_code_knows_better(self, tmp_path: Path) -> None:
        config = tiny.llama("student").config
        config.architectures = ["MyModel"]
        config.auto_map = {"AutoModelForCausalLM": "mine.MyModel"}
        config.save_pretrained(tmp_path)
        assert loading.load_config(str(tmp_path), trust_remote_code=True).model_type == "llama"


class TestLoadModel:
    def test_a_masked_model_keeps_its_head(self, tmp_path: Path) -> None:
        BertForPreTraining(small_bert()).save_pretrained(tmp_path)
        model = loading.load_model(
            str(tmp_path), loading.load_config(str(tmp_path)), dtype="float32"
        )
        assert isinstance(model, BertForMaskedLM)
        whole = AutoModelForMaskedLM.from_pretrained(tmp_path)
        assert torch.equal(model.cls.predictions.bias, whole.cls.predictions.bias)

    def test_weights_that_are_not_there_are_bad_input(self, tmp_path: Path) -> None:
        tiny.llama("student").config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"weights of '.*' cannot be read: .*safetensors"):
            loading.load_model(
                str(tmp_path), loading.load_config(str(tmp_path)), dtype="auto", revision=None
            )

    def test_the_level_of_the_log_is_put_back(self, tmp_path: Path) -> None:
        tiny.llama("student").save_pretrained(tmp_path)
        before = hf_logging.get_verbosity()
        config = loading.load_config(str(tmp_path))
        model = loading.load_model(str(tmp_path), config, dtype="auto", backbone=True)
        assert isinstance(model, LlamaModel)
        assert hf_logging.get_verbosity() == before


def gpt_neo() -> GPTNeoForCausalLM:
    config = GPTNeoConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        num_heads=4,
        max_position_embeddings=64,
        window_size=4,
    )
    return tiny.sharpened(GPTNeoForCausalLM, config)


def bloom() -> BloomForCausalLM:
    config = BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=4, n_head=4)
    return tiny.sharpened(BloomForCausalLM, config)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class TestCutAbove:
    # GPT-Neo and Bloom append the last hidden state by hand, after the norm.
    FAMILIES = (
        lambda: tiny.llama("teacher"),
        lambda: tiny.qwen3(depth=4),
        lambda: tiny.gpt2(depth=4),
        lambda: tiny.gemma3(depth=4),
        lambda: tiny.bert(depth=4),
        gpt_neo,
        bloom,
    )

    @pytest.mark.parametrize("make", FAMILIES, ids=range(len(FAMILIES)))
    def test_every_hidden_state_is_that_of_the_whole_model(
        self, make: Callable[[], PreTrainedModel], tmp_path: Path
    ) -> None:
        whole = make()
        whole.save_pretrained(tmp_path)
        inputs = {k: v for k, v in tiny.batch().items() if k != "labels"}
        batch = Batch(inputs, valid_rows(inputs["input_ids"], inputs["attention_mask"]))
        with torch.no_grad():
            expected = whole(**inputs, output_hidden_states=True).hidden_states
        sizes = []
        for layer in range(5):
            source = Local(str(tmp_path)).open(Request(hidden=frozenset({layer})), CPU)
            assert torch.equal(source(batch).states[layer], expected[layer]), layer
            assert source.model is not None
            sizes.append(count(source.model))
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[1] < sizes[2] < count(whole)

    def test_maps_need_no_block_above_them(self, tmp_path: Path) -> None:
        config = LlamaConfig(num_hidden_layers=6)
        assert loading.cut_above(config, Request(heads=frozenset({2}))).num_hidden_layers == 2
        both = Request(hidden=frozenset({1}), heads=frozenset({2}))
        assert loading.cut_above(config, both).num_hidden_layers == 2
        assert loading.cut_above(config, Request(hidden=frozenset({2}))).num_hidden_layers == 3
        assert config.num_hidden_layers == 6

    def test_kinds_of_blocks_are_cut_along(self) -> None:
        config = tiny.gemma3(depth=4).config
        cut = loading.cut_above(config, Request(hidden=frozenset({1})))
        assert cut.layer_types == ["sliding_attention"] * 2

    def test_logits_need_everything(self) -> None:
        config = LlamaConfig(num_hidden_layers=6)
        assert loading.cut_above(config, Request(logits=True, hidden=frozenset({1}))) is config

    def test_models_whose_blocks_depend_on_one_another_stay_whole(self) -> None:
        hybrid = Qwen3NextConfig(num_hidden_layers=8)
        shared = LlamaConfig(num_hidden_layers=6)
        shared.num_kv_shared_layers = 2
        for config in (hybrid, shared):
            assert loading.cut_above(config, Request(hidden=frozenset({1}))) is config


class TestFindTokenizer:
    def test_it_lies_beside_the_model(self, tmp_path: Path) -> None:
        on_disk.tokenizer().save_pretrained(tmp_path)
        tiny.llama("student").config.save_pretrained(tmp_path)
        found = loading.find_tokenizer(str(tmp_path))
        assert found is not None
        assert found.get_vocab() == on_disk.tokenizer().get_vocab()

    @pytest.mark.parametrize("name", [None, "", "nobody/nothing"])
    def test_none_where_there_is_none(self, name: str | None) -> None:
        assert loading.find_tokenizer(name) is None

    def test_none_in_a_folder_of_weights_alone(self, tmp_path: Path) -> None:
        tiny.llama("student").config.save_pretrained(tmp_path)
        assert loading.find_tokenizer(str(tmp_path)) is None


class TestWords:
    def test_dtypes(self) -> None:
        assert loading.dtype_name(torch.bfloat16, "Local") == "bfloat16"
        with pytest.raises(InputError, match="Local: dtype is 'bf16'; write one of float32, bfloa"):
            loading.dtype_name("bf16", "Local")

    @pytest.mark.parametrize(
        ("text", "line"),
        [("one\ntwo", "one"), ("Validation error:\n  why\n  more", "Validation error: why")],
    )
    def test_first_lines(self, text: str, line: str) -> None:
        assert loading.first_line(ValueError(text)) == line

    def test_an_error_without_words_is_named(self) -> None:
        assert loading.first_line(ValueError()) == "ValueError"
