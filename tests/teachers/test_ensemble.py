"""`Ensemble`: one distribution of several teachers, and hints of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    LayerMap,
    Local,
    Logits,
)
from llm_distill.errors import InputError
from llm_distill.layers import auto_race, last, uniform
from llm_distill.losses.blending import Blend
from llm_distill.losses.several import Several
from llm_distill.losses.sparse import TopK
from llm_distill.rows import Batch
from llm_distill.signals import Factored, Request, Signals
from tests import on_disk, tiny
from tests.teachers.test_local import batch

CPU = torch.device("cpu")
LOGITS = Request(logits=True)


def others() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two teachers of different depth, width and kind."""
    return tiny.llama("teacher"), tiny.gpt2()


@dataclass(frozen=True)
class Few(Local):
    """The teacher's likeliest tokens only."""

    model: Any = None
    k: int = 3

    def __init__(self, k: int) -> None:
        object.__setattr__(self, "k", k)
        super().__init__(tiny.llama("teacher"))

    def open(self, request: Request, device: torch.device) -> Any:
        source = super().open(request, device)

        class Cut:
            model, told = None, ()

            def prepare(self, batches: Sequence[Batch]) -> None:
                del batches

            def __call__(self, given: Any) -> Signals:
                whole = source(given).whole.logits(slice(None))
                return Signals("few", TopK.of(whole, k))

            def ask(self, request: Request) -> None:
                source.ask(request)

        k = self.k
        return Cut()


def trained(
    folder: Path, teacher: Any, objectives: list[Any], **changes: Any
) -> dict[str, torch.Tensor]:
    """Weights after three steps."""
    args = tiny.arguments(folder, **changes)
    student = tiny.llama("student")
    trainer = DistillTrainer(student, teacher, objectives, args, train_dataset=tiny.rows())
    trainer.train()
    return {k: v.clone() for k, v in trainer.student.state_dict().items()}


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class TestSpec:
    def test_it_is_the_first_with_what_all_have(self) -> None:
        a, b = others()
        made = Ensemble([Local(a), Local(b)])
        assert made.config is a.config
        assert (made.spec.depth, made.spec.vocabulary) == (4, tiny.VOCABULARY)
        assert [spec.depth for spec in made.spec.members] == [4, 3]
        assert made.spec.name == "Ensemble(LlamaForCausalLM, GPT2LMHeadModel)"
        assert made.shares == (0.5, 0.5)
        assert Ensemble(["a/b", "c/d"], [1, 3]).shares == (0.25, 0.75)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1.0], "1 weights for 2 members; write one for each"),
            ([1.0, 2.0, 3.0], "3 weights for 2 members"),
            ([1.0, -1.0], r"weights are \[1.0, -1.0\]; write numbers >= 0, one of them above 0"),
            ([0.0, 0.0], "one of them above 0"),
            ([1.0, float("nan")], "write numbers >= 0"),
            ("12", "weights are '12'; write a list of numbers, one for each member"),
            ({"a": 1, "b": 2}, "write a list of numbers"),
            (["a", 1], r"weights are \['a', 1\]; write a list of numbers"),
            ([True, 1], "write a list of numbers"),
            (3, "weights are 3; write a list"),
            ([10**400, 1], "weights are too large"),
        ],
    )
    def test_weights_that_do_not_fit(self, weights: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Ensemble(["a/b", "c/d"], weights)

    @pytest.mark.parametrize("unit", [1e308, 1e-320, 1, np.float32(2)])
    def test_weights_of_any_size(self, unit: Any) -> None:
        assert Ensemble(["a/b", "c/d"], [unit, unit]).shares == (0.5, 0.5)

    def test_unknown_words(self) -> None:
        given: Any = "mean"
        with pytest.raises(InputError, match="mode is 'mean'; write mixture or logit_mean"):
            Ensemble(["a/b", "c/d"], mode=given)
        with pytest.raises(InputError, match="confidence is 'mean'; write label or entropy"):
            Ensemble(["a/b", "c/d"], confidence=given)

    def test_its_tokenizer_is_the_first_there_is(self, tmp_path: Path) -> None:
        beside = on_disk.tokenizer()
        unknown, known = Local(tiny.llama("teacher")), Local(tiny.gpt2(), tokenizer=beside)
        assert Ensemble([unknown, known]).find_tokenizer() is beside
        assert Ensemble([unknown, unknown]).find_tokenizer() is None


class TestSignals:
    def test_a_mixture(self) -> None:
        source = Ensemble([Local(m) for m in others()], [1, 2]).open(LOGITS, CPU)
        said = source(batch())
        blend = said.logits
        assert isinstance(blend, Blend)
        labels = batch().supervised.labels
        found = blend.chunk(slice(0, len(blend))).logits(tiny.VOCABULARY, 1.0, labels).exp()
        expected = torch.zeros_like(found)
        for share, model in zip((1 / 3, 2 / 3), others(), strict=True):
            single = Local(model).open(LOGITS, CPU)(batch()).logits
            assert isinstance(single, Factored)
            expected += share * single.logits(slice(None)).softmax(-1)
        torch.testing.assert_close(found, expected)

    def test_members_are_asked_for_their_own_layers(self) -> None:
        source = Ensemble([Local(m) for m in others()]).open(
            Request(members=((1, Request(hidden=frozenset({3}))),)), CPU
        )
        said = source(batch())
        assert said.distribution is None
        assert not said.member(0).states
        assert set(said.member(1).states) == {3}

    def test_layers_of_nobody_are_refused(self) -> None:
        made = Ensemble([Local(m) for m in others()])
        with pytest.raises(ValueError, match=r"layers \[2\] are asked for without saying whose"):
            made.open(Request(hidden=frozenset({2})), CPU)
        source = made.open(LOGITS, CPU)
        with pytest.raises(ValueError, match="write member: 0 in the objective"):
            source.ask(Request(heads=frozenset({1})))

    def test_closing_closes_the_members(self) -> None:
        source = Ensemble([Local(m) for m in others()]).open(LOGITS, CPU)
        source.close()
        assert [member.model for member in source.sources] == [None, None]

    @pytest.mark.parametrize("turns", [False, True])
    def test_ensembles_nest(self, turns: bool) -> None:
        """Several may be a member of several."""
        a, b = (Local(model) for model in others())
        inner = Ensemble([a, b], turns=turns)
        said = Ensemble([inner, a], turns=turns).open(LOGITS, CPU)(batch()).logits
        flat = Ensemble([a, b, a], [1, 1, 2]).open(LOGITS, CPU)(batch()).logits
        assert isinstance(said, Blend)
        assert isinstance(flat, Blend)
        labels = batch().supervised.labels
        one, two = (
            x.chunk(slice(0, len(x))).logits(tiny.VOCABULARY, 2.0, labels) for x in (said, flat)
        )
        torch.testing.assert_close(one, two)


class TestSparseMembers:
    """Members that tell a few tokens of each row, as a cache does."""

    def test_all_of_them(self, tmp_path: Path) -> None:
        teacher = Ensemble([Few(3), Few(5)], [1, 3])
        said = teacher.open(LOGITS, CPU)(batch()).logits
        assert isinstance(said, Several)
        assert [part.ids.shape[1] for part in said.parts] == [3, 5]
        data = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(5)}
        args, student = tiny.arguments(tmp_path), tiny.llama("student")
        trainer = DistillTrainer(student, teacher, [Logits()], args, **data)
        trainer.train()
        assert trainer.evaluate()["eval_kl"] > 0

    @pytest.mark.parametrize(
        "teacher",
        [
            lambda: Ensemble([Few(3), Local(tiny.llama("teacher"))]),
            lambda: Ensemble([Few(3), Few(3)], mode="logit_mean"),
            lambda: Ensemble([Few(3), Few(3)], confidence="label"),
        ],
    )
    def test_what_needs_whole_distributions(self, teacher: Any) -> None:
        with pytest.raises(ValueError, match="combines whole distributions, and its member few "):
            teacher().open(LOGITS, CPU)(batch())


class TestTraining:
    @pytest.mark.parametrize("mode", ["mixture", "logit_mean"])
    def test_twice_the_same_teacher_is_that_teacher(self, tmp_path: Path, mode: Any) -> None:
        objectives = [CrossEntropy(weight=0.1), Logits(temperature=2.0)]
        twice = Ensemble([Local(tiny.llama("teacher")) for _ in range(2)], [1, 3], mode=mode)
        once = trained(tmp_path, tiny.llama("teacher"), objectives)
        assert far(trained(tmp_path, twice, objectives), once) < 1e-6
        assert far(tiny.llama("student").state_dict(), once) > 1e-4

    def test_a_hint_of_a_member_is_that_of_the_teacher(self, tmp_path: Path) -> None:
        """The same map, found on the same layers, and the same projectors."""
        a, b = others()
        both = Ensemble([Local(a), Local(b)])
        for member, single in enumerate((a, b)):
            ours = [CrossEntropy(), HiddenStates(member=member), AttentionMaps(member=member)]
            theirs = [CrossEntropy(), HiddenStates(), AttentionMaps()]
            one = trained(tmp_path / f"{member}a", both, ours)
            assert far(one, trained(tmp_path / f"{member}b", single, theirs)) == 0.0

    def test_each_member_has_a_map_of_its_own(self, tmp_path: Path) -> None:
        """Hints of both at once: two terms, two maps, projectors of the members' widths."""
        teacher = Ensemble([Local(model) for model in others()])
        objectives = [
            HiddenStates(member=0),
            HiddenStates(member=1, layers=last),
            HiddenStates(member=0, layers=uniform, blockwise=0.3),
        ]
        data = {"train_dataset": tiny.rows()}
        args = tiny.arguments(tmp_path, max_steps=4)
        trainer = DistillTrainer(tiny.llama("student"), teacher, objectives, args, **data)
        terms = trainer.run.terms.values()
        maps: list[LayerMap] = [term.mapping for term in terms if term.mapping is not None]
        assert [mapping.teacher_depth for mapping in maps] == [4, 3, 4]
        assert [term.member for term in terms] == [0, 1, 0]
        trainer.train()
        assert all(p.isfinite().all() for p in trainer.distiller.parameters())

    def test_turns_change_nothing(self, tmp_path: Path) -> None:
        objectives = [Logits(), HiddenStates(member=1, layers=last)]
        made = [Ensemble([Local(m) for m in others()], turns=turns) for turns in (False, True)]
        one, two = (trained(tmp_path, teacher, objectives) for teacher in made)
        assert far(one, two) == 0.0

    def test_members_with_different_padding(self, tmp_path: Path) -> None:
        """Cut to the common tokens and renormalised, as one teacher with padding is."""
        wide, tokenizer = tiny.llama("teacher", vocabulary=140), tiny.tokenizer()
        members = [Local(tiny.llama("teacher"), tokenizer=tokenizer), Local(wide, tokenizer)]
        args, student = tiny.arguments(tmp_path), tiny.llama("student")
        data = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(5)}
        trainer = DistillTrainer(
            student, Ensemble(members), [Logits()], args, processing_class=tokenizer, **data
        )
        trainer.train()
        assert 0 < trainer.evaluate()["eval_kl"] < 10


class TestBadInput:
    def refused(self, folder: Path, teacher: Any, objectives: list[Any], **given: Any) -> str:
        with pytest.raises(InputError) as caught:
            DistillTrainer(
                tiny.llama("student"), teacher, objectives, tiny.arguments(folder), **given
            )
        return str(caught.value)

    def test_different_tokenizers(self, tmp_path: Path) -> None:
        words = tiny.tokenizer()
        swapped = tiny.tokenizer(60)
        members = [Local(tiny.llama("teacher"), words), Local(tiny.gpt2(), swapped)]
        message = self.refused(tmp_path, Ensemble(members), [Logits()], processing_class=words)
        assert message == (
            "Ensemble(LlamaForCausalLM, GPT2LMHeadModel): the tokenizers differ: token 60 is 'w60' "
            "for the member LlamaForCausalLM and None for the member GPT2LMHeadModel; several "
            "teachers need one tokenizer: take models of one family"
        )

    def test_unknown_tokenizers_and_heads_of_other_sizes(self, tmp_path: Path) -> None:
        members = [Local(tiny.llama("teacher")), Local(tiny.llama("teacher", vocabulary=99))]
        message = self.refused(tmp_path, Ensemble(members), [Logits()])
        assert "have 128 and 99 tokens, and not both tokenizers are known" in message

    def test_causal_and_masked_members(self, tmp_path: Path) -> None:
        members = [Local(tiny.llama("teacher")), Local(tiny.bert())]
        message = self.refused(tmp_path, Ensemble(members), [Logits()])
        assert "causal and masked language models among the members" in message

    def test_the_student_as_a_member(self, tmp_path: Path) -> None:
        student = tiny.llama("student")
        with pytest.raises(InputError, match="model and teacher are one object"):
            DistillTrainer(
                student,
                Ensemble([Local(tiny.llama("teacher")), Local(student)]),
                [Logits()],
                tiny.arguments(tmp_path),
            )

    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            (HiddenStates(), "HiddenStates: no member of the teacher Ensemble(LlamaForCausalLM, "),
            (HiddenStates(member=2), "HiddenStates: member 2 of the teacher Ensemble("),
            (AttentionMaps(member=-1), "write member: one of 0 (LlamaForCausalLM), 1 (GPT2LM"),
            (HiddenStates(member=0, layers=auto_race), "auto_race and refresh are for one teacher"),
        ],
    )
    def test_a_hint_of_nobody(self, tmp_path: Path, objective: Any, message: str) -> None:
        teacher = Ensemble([Local(model) for model in others()])
        assert message in self.refused(tmp_path, teacher, [Logits(), objective])

    def test_a_member_of_one_teacher(self, tmp_path: Path) -> None:
        message = self.refused(tmp_path, tiny.llama("teacher"), [HiddenStates(member=0)])
        assert message.endswith(
            "member 0 of the teacher LlamaForCausalLM; there is one: leave it out"
        )
