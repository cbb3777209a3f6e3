"""One vocabulary for both models: found, given, unknown, padded, different."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llm_distill import FromConfig, Local
from llm_distill.errors import InputError
from llm_distill.students import Student, student_spec
from llm_distill.teachers import Teacher
from llm_distill.vocabulary import check_vocabularies, settle_tokenizers
from tests import on_disk, tiny

SIZE = on_disk.VOCABULARY


def other() -> PreTrainedTokenizerFast:
    """A tokenizer of another corpus."""
    return on_disk.tokenizer("zebras graze where lions doze, and lions doze where zebras graze")


def settle(model: Student, teacher: Teacher, given: PreTrainedTokenizerFast | None = None) -> Any:
    """As a run does it."""
    return settle_tokenizers(model, teacher, student_spec(model, teacher.config), given)


def saved(folder: Path, role: str, *corpus: str) -> str:
    """A model with its tokenizer in a folder."""
    return str(on_disk.save_model(folder, role, *corpus))


class TestSettle:
    def test_two_copies_of_one_tokenizer(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        student, teacher = saved(tmp_path / "s", "student"), saved(tmp_path / "t", "teacher")
        found = settle(student, Local(teacher))
        assert found.get_vocab() == on_disk.tokenizer().get_vocab()
        assert not caplog.records

    def test_different_ones_are_refused_with_both_names(self, tmp_path: Path) -> None:
        student = saved(tmp_path / "s", "student", "zebras graze where lions doze and zebras graze")
        teacher = saved(tmp_path / "t", "teacher")
        with pytest.raises(InputError, match="the tokenizers differ: token ") as caught:
            settle(student, Local(teacher))
        assert student in str(caught.value)
        assert teacher in str(caught.value)
        assert "one family" in str(caught.value)

    def test_a_random_student_has_the_teachers(self, tmp_path: Path) -> None:
        teacher = saved(tmp_path, "teacher")
        config = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
        found = settle(FromConfig("llama", config), Local(teacher))
        assert found.get_vocab() == on_disk.tokenizer().get_vocab()

    def test_a_loaded_models_is_found_by_its_name(self, tmp_path: Path) -> None:
        path = saved(tmp_path, "student")
        loaded = LlamaForCausalLM.from_pretrained(path)
        with pytest.raises(InputError, match="the tokenizers differ"):
            settle(loaded, Local(tiny.llama("teacher", vocabulary=SIZE), tokenizer=other()))
        assert settle(loaded, Local(path)) is not None

    def test_one_that_is_given_counts(self, tmp_path: Path) -> None:
        student = tiny.llama("student", vocabulary=SIZE)
        teacher = Local(saved(tmp_path, "teacher"))
        given = on_disk.tokenizer()
        assert settle(student, teacher, given) is given
        with pytest.raises(InputError, match="the tokenizers differ"):
            settle(student, teacher, other())

    def test_one_object_for_both_is_not_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise AssertionError

        monkeypatch.setattr("llm_distill.vocabulary.check_vocabularies", fail)
        both = on_disk.tokenizer()
        student = tiny.llama("student", vocabulary=SIZE)
        teacher = Local(tiny.llama("teacher", vocabulary=SIZE), tokenizer=both)
        assert settle(student, teacher, both) is both

    @pytest.mark.parametrize(("ours", "theirs"), [(304, 320), (320, 304)])
    def test_padded_heads_of_one_tokenizer_are_one_vocabulary(
        self, ours: int, theirs: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        student = tiny.llama("student", vocabulary=ours)
        teacher = Local(tiny.llama("teacher", vocabulary=theirs), tokenizer=on_disk.tokenizer())
        assert settle(student, teacher, on_disk.tokenizer()) is not None
        assert not caplog.records

    def test_unknown_tokenizers_with_equal_sizes_are_warned_of(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            found = settle(tiny.llama("student"), Local(tiny.llama("teacher")))
        assert found is None
        assert "Nothing says that the student LlamaForCausalLM and the teacher" in caplog.text
        assert "Local(model, tokenizer=…)" in caplog.text

    def test_unknown_tokenizers_with_unequal_sizes_are_refused(self) -> None:
        student = tiny.llama("student", vocabulary=120)
        with pytest.raises(InputError, match=r"has 120 tokens, the teacher \w+ 128, and not both"):
            settle(student, Local(tiny.llama("teacher")))

    def test_one_known_tokenizer_is_used_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        teacher = Local(tiny.llama("teacher", vocabulary=SIZE), tokenizer=on_disk.tokenizer())
        assert settle(tiny.llama("student", vocabulary=SIZE), teacher) is teacher.tokenizer
        assert "Nothing says" in caplog.text

    @pytest.mark.parametrize("known", ["student", "teacher"])
    def test_more_tokens_than_the_head_has_rows_are_refused(self, known: str) -> None:
        tokenizer = on_disk.tokenizer()
        student = tiny.llama("student", vocabulary=SIZE - 20)
        teacher = Local(
            tiny.llama("teacher", vocabulary=SIZE - 20),
            tokenizer=tokenizer if known == "teacher" else None,
        )
        with pytest.raises(
            InputError, match=rf"tokenizer has {SIZE} tokens, \w+ only {SIZE - 20}; run .*resize_to"
        ):
            settle(student, teacher, tokenizer if known == "student" else None)


class TestCheck:
    def test_the_first_token_that_differs_is_named(self) -> None:
        ours, theirs = on_disk.tokenizer(), on_disk.tokenizer()
        theirs.add_tokens(["<new>"])
        with pytest.raises(
            InputError,
            match=f"token {SIZE} is None for the student a and '<new>' for the teacher b",
        ):
            check_vocabularies(ours, theirs, ("a", "b"))

    def test_copies_pass(self) -> None:
        tokenizer = on_disk.tokenizer()
        check_vocabularies(tokenizer, copy.deepcopy(tokenizer), ("a", "b"))
