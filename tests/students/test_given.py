"""Students of every kind: loading them, what is known before, and adapters on their heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llm_distill import FromConfig, Local
from llm_distill.capture import plain
from llm_distill.errors import InputError
from llm_distill.lm_head import head_of
from llm_distill.signals import ModelSpec
from llm_distill.students import (
    FromTeacher,
    head_name,
    load_student,
    refuse_adapted_head,
    student_spec,
)
from tests import tiny
from tests.students.conftest import SMALL


class TestLoadStudent:
    def test_a_loaded_model_is_taken_as_it_is(self, student: PreTrainedModel) -> None:
        assert load_student(student, Local(tiny.llama("teacher"))) is student

    def test_masters_are_fp32_and_teachers_as_saved(self, tmp_path: Path) -> None:
        tiny.llama("student").bfloat16().save_pretrained(tmp_path)
        teacher = Local(tiny.llama("teacher"))
        assert load_student(str(tmp_path), teacher).dtype is torch.float32
        assert load_student(Local(str(tmp_path)), teacher).dtype is torch.float32
        spec = Local(str(tmp_path), dtype="bfloat16")
        assert load_student(spec, teacher).dtype is torch.bfloat16
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
        teacher = Local(tiny.llama("teacher"))
        load_student(Local(str(tmp_path), revision="v1", trust_remote_code=True), teacher)
        load_student(str(tmp_path), teacher)
        assert (seen[0]["revision"], seen[0]["trust_remote_code"]) == ("v1", True)
        assert "revision" not in seen[1]
        assert seen[1]["trust_remote_code"] is False

    def test_those_that_are_made_for_a_teacher(self) -> None:
        teacher = Local(tiny.llama("teacher"))
        assert load_student(FromConfig("llama", SMALL), teacher).config.hidden_size == 32
        cut = load_student(FromTeacher(2), teacher)
        assert (cut.config.hidden_size, cut.config.num_hidden_layers) == (64, 2)


class TestSpec:
    def test_it_is_known_without_weights(self, config: PreTrainedConfig, tmp_path: Path) -> None:
        tiny.llama("student").config.save_pretrained(tmp_path)
        expected = {"depth": 2, "width": 32, "heads": 4}
        for student in (FromConfig("llama", SMALL), str(tmp_path), tiny.llama("student")):
            spec = student_spec(student, config)
            assert isinstance(spec, ModelSpec)
            assert {key: getattr(spec, key) for key in expected} == expected

    def test_in_fewer_bits_it_is_refused(self, config: PreTrainedConfig, tmp_path: Path) -> None:
        tiny.llama("student").save_pretrained(tmp_path)
        student = Local(str(tmp_path), quantize="bitsandbytes_8bit")
        with pytest.raises(InputError, match="is for teachers; a student is trained in all of its"):
            student_spec(student, config)

    def test_its_name(self, config: PreTrainedConfig) -> None:
        assert student_spec(FromConfig("llama", SMALL), config).name == "FromConfig(llama)"
        assert student_spec(tiny.llama("student"), config).name == "LlamaForCausalLM"

    def test_a_cut_student(self) -> None:
        spec = student_spec(FromTeacher(2), tiny.llama("teacher").config)
        assert (spec.name, spec.depth, spec.width) == ("FromTeacher(ends 2)", 2, 64)
        assert spec.blocks == (1, 4)

    def test_a_family_that_cannot_be_cut_is_refused_without_weights(self) -> None:
        config = tiny.gpt2(depth=4).config
        config.scale_attn_by_inverse_layer_idx = True
        with pytest.raises(InputError, match="GPT2LMHeadModel cannot be cut to these blocks"):
            student_spec(FromTeacher(2), config)

    @pytest.mark.parametrize(("depth", "blocks"), [(4, (1, 4)), (6, None)])
    def test_blocks_of_a_saved_one_are_those_of_its_own_teacher(
        self, depth: int, blocks: tuple[int, ...] | None, tmp_path: Path
    ) -> None:
        FromTeacher(2).load(Local(tiny.llama("teacher"))).save_pretrained(tmp_path)
        teacher = LlamaConfig(num_hidden_layers=depth)
        assert student_spec(str(tmp_path), teacher).blocks == blocks
        assert student_spec(tiny.llama("student"), teacher).blocks is None

    def test_a_class_from_elsewhere_is_compared_when_it_is_loaded(self) -> None:
        class Own(LlamaConfig):
            model_type = "own_llama"

        assert student_spec(FromTeacher(2), Own(num_hidden_layers=4)).blocks == (1, 4)


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
    @pytest.mark.parametrize("kind", ["path", "loaded", "random", "cut"])
    def test_by_any_way_of_naming_it(
        self, kind: str, options: dict[str, Any], refused: bool, tmp_path: Path
    ) -> None:
        tiny.llama("student").config.save_pretrained(tmp_path)
        students: dict[str, Any] = {
            "path": str(tmp_path),
            "loaded": tiny.llama("student"),
            "random": FromConfig("llama", SMALL),
            "cut": FromTeacher(2),
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
