"""One vocabulary for both models: found, given, unknown, padded, different."""

import copy
import logging
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import normalizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llm_distill import (
    AttentionMaps,
    Contrastive,
    CrossEntropy,
    FromConfig,
    FromTeacher,
    HiddenStates,
    Local,
    Logits,
    Relations,
    binding,
    pkt,
)
from llm_distill.errors import InputError
from llm_distill.layers import auto_race
from llm_distill.objectives import Objective
from llm_distill.signals import ModelSpec
from llm_distill.students import Student, student_spec
from llm_distill.teachers import Teacher
from llm_distill.vocabulary import (
    Tokenizers,
    check_alignment,
    find_difference,
    settle_tokenizers,
)
from tests import on_disk, tiny

SIZE = on_disk.VOCABULARY
POOLED: dict[str, Any] = {"items": "pooled", "rows": "valid"}


def other() -> PreTrainedTokenizerFast:
    """A tokenizer of another corpus."""
    return on_disk.tokenizer("zebras graze where lions doze, and lions doze where zebras graze")


def settle(
    model: Student, teacher: Teacher, given: PreTrainedTokenizerFast | None = None
) -> Tokenizers:
    """As a run does it."""
    return settle_tokenizers(model, teacher, student_spec(model, teacher.config), given)


def shared(
    model: Student, teacher: Teacher, given: PreTrainedTokenizerFast | None = None
) -> PreTrainedTokenizerFast:
    """The one tokenizer of both."""
    found = settle(model, teacher, given)
    assert (found.theirs, found.difference, found.told) == (None, "", ())
    return cast("PreTrainedTokenizerFast", found.ours)


def saved(folder: Path, role: str, *corpus: str) -> str:
    """A model with its tokenizer in a folder."""
    return str(on_disk.save_model(folder, role, *corpus))


class TestSettle:
    def test_two_copies_of_one_tokenizer(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        student, teacher = saved(tmp_path / "s", "student"), saved(tmp_path / "t", "teacher")
        found = shared(student, Local(teacher))
        assert found.get_vocab() == on_disk.tokenizer().get_vocab()
        assert not caplog.records

    def test_different_ones_are_both_kept_with_what_differs(self, tmp_path: Path) -> None:
        student = saved(tmp_path / "s", "student", "zebras graze where lions doze and zebras graze")
        teacher = saved(tmp_path / "t", "teacher")
        found = settle(student, Local(teacher))
        assert found.ours is not None
        assert found.theirs is not None
        assert found.ours.get_vocab() != found.theirs.get_vocab()
        assert found.theirs.get_vocab() == on_disk.tokenizer().get_vocab()
        assert found.difference.startswith("the tokenizers differ: token ")
        assert student in found.difference
        assert teacher in found.difference
        assert found.told == (
            f"{found.difference}; nothing compares the two models token by token, so there is no "
            "KL and no agreement",
        )

    def test_a_student_cut_from_its_teacher_keeps_its_tokens(self, tmp_path: Path) -> None:
        teacher = Local(saved(tmp_path, "teacher"))
        with pytest.raises(InputError, match=r"differ.*embeddings of the teacher's tokens: leave"):
            settle(FromTeacher(depth=2), teacher, other())

    def test_a_random_student_has_the_teachers(self, tmp_path: Path) -> None:
        teacher = saved(tmp_path, "teacher")
        config = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
        found = shared(FromConfig("llama", config), Local(teacher))
        assert found.get_vocab() == on_disk.tokenizer().get_vocab()

    def test_a_loaded_models_is_found_by_its_name(self, tmp_path: Path) -> None:
        path = saved(tmp_path, "student")
        loaded = LlamaForCausalLM.from_pretrained(path)
        theirs = other()
        found = settle(loaded, Local(tiny.llama("teacher", vocabulary=SIZE), tokenizer=theirs))
        assert found.theirs is theirs
        assert shared(loaded, Local(path)) is not None

    def test_one_that_is_given_counts(self, tmp_path: Path) -> None:
        student = tiny.llama("student", vocabulary=SIZE)
        teacher = Local(saved(tmp_path, "teacher"))
        given = on_disk.tokenizer()
        assert shared(student, teacher, given) is given
        assert settle(student, teacher, other()).difference

    def test_one_object_for_both_is_not_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise AssertionError

        monkeypatch.setattr("llm_distill.vocabulary.find_difference", fail)
        both = on_disk.tokenizer()
        student = tiny.llama("student", vocabulary=SIZE)
        teacher = Local(tiny.llama("teacher", vocabulary=SIZE), tokenizer=both)
        assert shared(student, teacher, both) is both

    @pytest.mark.parametrize(("ours", "theirs"), [(304, 320), (320, 304)])
    def test_padded_heads_of_one_tokenizer_are_one_vocabulary(
        self, ours: int, theirs: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        student = tiny.llama("student", vocabulary=ours)
        teacher = Local(tiny.llama("teacher", vocabulary=theirs), tokenizer=on_disk.tokenizer())
        assert shared(student, teacher, on_disk.tokenizer()) is not None
        assert not caplog.records

    def test_unknown_tokenizers_with_equal_sizes_are_warned_of(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            found = settle(tiny.llama("student"), Local(tiny.llama("teacher")))
        assert found == Tokenizers()
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
        assert shared(tiny.llama("student", vocabulary=SIZE), teacher) is teacher.tokenizer
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

    @pytest.mark.parametrize(
        ("ours", "theirs", "message"),
        [
            (SIZE - 20, on_disk.FOREIGN, rf"{SIZE} tokens, \w+ only {SIZE - 20}"),
            (SIZE, SIZE - 30, rf"{on_disk.FOREIGN} tokens, \w+ only {SIZE - 30}"),
        ],
    )
    def test_each_head_is_held_against_its_own_tokenizer(
        self, ours: int, theirs: int, message: str
    ) -> None:
        student = tiny.llama("student", vocabulary=ours)
        teacher = Local(tiny.llama("teacher", vocabulary=theirs), tokenizer=on_disk.foreign())
        with pytest.raises(InputError, match=message):
            settle(student, teacher, on_disk.tokenizer())

    def test_a_sequence_has_the_positions_of_those_who_read_it(self) -> None:
        long, short = (ModelSpec("m", "llama", 1, 8, 1, 9, positions=n) for n in (64, 32))
        none = ModelSpec("m", "llama", 1, 8, 1, 9)
        same, apart = Tokenizers(on_disk.tokenizer()), Tokenizers(on_disk.tokenizer(), other(), "x")
        assert (same.positions(long, short), same.positions(none, short)) == (32, 32)
        assert (apart.positions(long, short), apart.positions(none, short)) == (64, None)
        translator = apart.translator(short)
        assert translator is not None
        assert translator.positions == 32
        assert same.translator(short) is None


class TestAlignment:
    """What needs one vocabulary, by message."""

    FOUND = Tokenizers(on_disk.tokenizer(), on_disk.foreign(), "the tokenizers differ: token 0")

    def check(self, *objectives: Objective, causal: bool = True, found: Any = FOUND) -> None:
        models = (tiny.llama(role, vocabulary=SIZE) for role in ("student", "teacher"))
        specs = [ModelSpec.of(model.config, "m") for model in models]
        terms = binding.bind(objectives, specs[0], specs[1], seed=0)
        check_alignment(found, objectives, terms, causal=causal)

    def test_what_needs_no_aligned_tokens(self) -> None:
        self.check(
            CrossEntropy(),
            HiddenStates(**POOLED, init="least_squares"),
            HiddenStates(loss=pkt, **POOLED, name="pkt"),
            Contrastive(rows="valid"),
        )

    @pytest.mark.parametrize(
        "refused",
        [
            Logits(),
            HiddenStates(),
            HiddenStates(loss=pkt, rows="valid"),
            HiddenStates(loss=pkt, items="pooled"),
            HiddenStates(rows="valid", items="sequence"),
            HiddenStates(**POOLED, blockwise=0.1),
            Contrastive(),
            Contrastive(rows="valid", items="token"),
            AttentionMaps(rows="valid"),
            Relations(rows="valid"),
        ],
        ids=lambda o: f"{type(o).__name__} {o.describe()}",
    )
    def test_what_does_is_refused(self, refused: Objective) -> None:
        name = type(refused).__name__
        advice = r"one family.*same tokenizer; or .*CrossEntropy.*items: pooled, rows: valid"
        with pytest.raises(
            InputError,
            match=f"differ: token 0; {name} compares the models token by token.*{advice}",
        ):
            self.check(CrossEntropy(), refused)
        self.check(CrossEntropy(), refused, found=Tokenizers(on_disk.tokenizer()))

    def test_the_first_that_does_is_named(self) -> None:
        first = HiddenStates(rows="valid", name="deep")
        with pytest.raises(InputError, match="deep compares"):
            self.check(CrossEntropy(), HiddenStates(**POOLED), first, Logits())

    def test_masked_models_are_refused(self) -> None:
        with pytest.raises(InputError, match="masked language models need one vocabulary"):
            self.check(CrossEntropy(), HiddenStates(**POOLED), causal=False)

    def test_a_race_is_refused(self) -> None:
        raced = HiddenStates(**POOLED, layers=auto_race)
        with pytest.raises(
            InputError, match=r"auto_race judges maps by the KL.*write layers: auto"
        ):
            self.check(CrossEntropy(), raced)


class TestDifference:
    def test_the_first_token_that_differs_is_named(self) -> None:
        ours, theirs = on_disk.tokenizer(), on_disk.tokenizer()
        theirs.add_tokens(["<new>"])
        assert find_difference(ours, theirs, ("a", "b")) == (
            f"the tokenizers differ: token {SIZE} is None for the student a and '<new>' for the "
            "teacher b"
        )

    def test_one_vocabulary_cut_otherwise(self) -> None:
        ours, theirs = on_disk.tokenizer(), on_disk.tokenizer()
        backend = theirs.backend_tokenizer
        backend.normalizer = normalizers.Lowercase()
        found = find_difference(ours, theirs, ("a", "b"))
        assert "have one vocabulary and cut text differently: token 0 of" in found
        assert "is 'D' and 'd'" in found

    def test_copies_have_none(self) -> None:
        tokenizer = on_disk.tokenizer()
        assert find_difference(tokenizer, copy.deepcopy(tokenizer), ("a", "b")) == ""
