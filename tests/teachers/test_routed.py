"""`Routed`: each example to its expert, rows back in their order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    Local,
    Logits,
    Routed,
)
from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import auto
from llm_distill.losses.blending import Switch
from llm_distill.losses.sparse import TopK
from llm_distill.rows import Batch
from llm_distill.signals import Request, Signals
from llm_distill.teachers import columns_of, routers
from llm_distill.teachers.ensemble import EnsembleSource
from llm_distill.teachers.routed import RoutedSource, collective
from tests import tiny

CPU = torch.device("cpu")
LOGITS = Request(logits=True)
NAMES = ("a", "b", "b", "a", "b")


def batch(names: tuple[str, ...] = NAMES) -> Batch:
    """Sequences of different lengths, some without a supervised row."""
    rows = [dict(tiny.rows(empty=(2,))[k]) | {"kind": n} for k, n in enumerate(names)]
    collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=True, columns=("kind",))
    return make_batch(collate(rows), None, seed=0, epoch=0)


def twins() -> tuple[Any, Any]:
    """Two experts of one shape."""
    one = tiny.llama("teacher")
    return one, tiny.sharpened(type(one), one.config, seed=5)


def routed(*, turns: bool = False) -> Routed:
    return Routed(dict(zip("ab", twins(), strict=True)), by="kind", turns=turns)


def data(names: Any = None) -> datasets.Dataset:
    chosen = names or [NAMES[k % 5] for k in range(32)]
    return tiny.rows(len(chosen)).add_column("kind", chosen)


class TestSpec:
    def test_it_is_the_first_expert_with_what_all_have(self) -> None:
        made = Routed({"a": "x/y", 1: Local(tiny.gpt2())}, by="kind")  # type: ignore[dict-item]
        assert made.names == ("a", "1")
        assert made.teachers[0] == Local("x/y")
        assert routed().spec.depth == 4
        assert routed().spec.members == ()
        assert routed().find_tokenizer() is None

    @pytest.mark.parametrize(
        ("experts", "by", "message"),
        [
            (["a/b", "c/d"], "kind", "experts are teachers by their names; write experts"),
            ({"a": "a/b"}, "kind", "experts are a; write two or more by the names that the column"),
            ({}, "kind", r"experts are none; write two or more .*: \{code: a/model, prose: "),
            ({"a": "a/b", "b": "c/d"}, "", "by is ''; write the column that names the experts"),
        ],
    )
    def test_what_routes_nowhere(self, experts: Any, by: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Routed(experts, by=by)

    def test_columns(self) -> None:
        nested = Ensemble([routed(), Routed({"a": routed(), "b": "c/d"}, by="other")])
        assert columns_of(nested) == ("kind", "other")
        assert len(routers(nested)) == 3
        assert columns_of(Local("a/b")) == ()


class TestSignals:
    @pytest.mark.parametrize("turns", [False, True])
    def test_every_row_is_its_experts(self, turns: bool) -> None:
        given = batch()
        request = Request(logits=True, hidden=frozenset({2, 4}))
        said = routed(turns=turns).open(request, CPU)(given)
        switch = said.logits
        assert isinstance(switch, Switch)
        labels = given.supervised.labels
        found = switch.chunk(slice(0, len(switch))).logits(tiny.VOCABULARY, 1.0, labels)
        for name, model in zip("ab", twins(), strict=True):
            whole = Local(model).open(request, CPU)(given)
            mine = torch.tensor([n == name for n in NAMES])
            rows = mine[given.supervised.sequence]
            assert rows.any()
            expected = whole.whole.logits(slice(None))[rows]
            torch.testing.assert_close(found[rows], expected, rtol=1e-5, atol=1e-5)
            for layer in (2, 4):
                ours, theirs = said.states[layer][mine], whole.states[layer][mine]
                real = given.inputs["attention_mask"][mine] == 1
                torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
    def test_experts_of_two_dtypes_lose_nothing(self, first: torch.dtype) -> None:
        """Whichever comes first."""
        request, given = Request(hidden=frozenset({2})), batch()
        one, two = twins()
        other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[first]
        one.to(first), two.to(other)
        said = Routed({"a": one, "b": two}, by="kind").open(request, CPU)(given).states[2]
        assert said.dtype == torch.float32
        for name, model in (("a", one), ("b", two)):
            mine = [k for k, n in enumerate(NAMES) if n == name]
            own = Local(model).open(request, CPU)(given.only(mine)).states[2].float()
            real = given.only(mine).inputs["attention_mask"] == 1
            torch.testing.assert_close(said[mine][real], own[real], rtol=0, atol=0)

    def test_an_expert_without_examples_does_not_run(self) -> None:
        source = routed().open(LOGITS, CPU)
        source.sources[1].close()  # and would raise
        said = source(batch(("a", "a"))).logits
        assert isinstance(said, Switch)
        assert len(said.parts) == 1
        with pytest.raises(RuntimeError, match="closed"):
            source(batch())

    def test_a_sharded_expert_always_takes_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its forward is a collective call that other ranks wait in."""
        asked: list[int] = []
        source = routed().open(LOGITS, CPU)
        first, second = source.sources

        class Counting:
            model = second.model

            def __call__(self, given: Batch) -> Signals:
                asked.append(len(given.inputs["input_ids"]))
                return second(given)

        source.sources = (first, Counting())  # type: ignore[assignment]
        monkeypatch.setattr(
            "llm_distill.teachers.routed.in_pieces", lambda model: model is Counting.model
        )
        said = source(batch(("a", "a"))).logits
        assert asked == [1]
        assert len(said) == len(batch(("a", "a")).supervised)

    def test_a_member_of_an_expert_counts_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = Local(tiny.llama("student")).open(Request(logits=True), torch.device("cpu"))
        spec = Ensemble([tiny.llama("student"), tiny.llama("student")])
        pair = EnsembleSource(spec, [one, one], Request(logits=True))
        assert not collective(pair)
        monkeypatch.setattr(
            "llm_distill.teachers.routed.in_pieces", lambda model: model is one.model
        )
        assert collective(pair)

    def test_experts_that_keep_a_few_tokens(self) -> None:
        class Top:
            model = None

            def __init__(self, shift: float, k: int) -> None:
                self.shift, self.k = shift, k

            def __call__(self, given: Batch) -> Signals:
                n = len(given.supervised)
                logits = torch.arange(n * 6.0).view(n, 6).sin() + self.shift
                logits[:, 0] = given.supervised.token.float()
                return Signals("top", TopK.of(logits, self.k))

        source = RoutedSource(routed(), [Top(0.0, 2), Top(1.0, 2)])  # type: ignore[list-item]
        given = batch()
        said = source(given).logits
        assert isinstance(said, TopK)
        assert said.ids[:, 0].tolist() == [0] * len(given.supervised)
        order = torch.tensor([NAMES[s] == "a" for s in given.supervised.sequence.tolist()])
        alone = Top(0.0, 2)(given.only([0, 3])).logits
        assert isinstance(alone, TopK)
        assert torch.equal(said.log_probs[order], alone.log_probs)
        other = RoutedSource(routed(), [Top(0.0, 2), Top(1.0, 3)])  # type: ignore[list-item]
        narrow = other(given).logits  # as many as the narrowest tells, the rest in the tails
        assert isinstance(narrow, TopK)
        assert torch.equal(narrow.ids[order], alone.ids)
        whole = Top(1.0, 3)(given.only([1, 2, 4])).logits
        assert isinstance(whole, TopK)
        assert torch.equal(narrow.ids[~order], whole.ids[:, :2])
        tail = whole.tail.exp() + whole.log_probs[:, 2].exp()
        torch.testing.assert_close(narrow.tail[~order].exp(), tail)

    def test_only_what_experts_share(self) -> None:
        apart = Routed({"a": tiny.llama("teacher"), "b": tiny.gpt2()}, by="kind")
        apart.open(LOGITS, CPU).close()
        with pytest.raises(ValueError, match=r"have different layers \(LlamaForCausalLM: 4 blocks"):
            apart.open(Request(hidden=frozenset({1})), CPU)
        with pytest.raises(ValueError, match=r"attention of blocks \[1\] is asked for; use Logits"):
            routed().open(Request(heads=frozenset({1})), CPU)

    def test_a_batch_that_does_not_say(self) -> None:
        source = routed().open(LOGITS, CPU)
        with pytest.raises(InputError, match="a batch of 5 sequences has 0 values of 'kind'"):
            source(replace(batch(), columns={}))
        with pytest.raises(InputError, match="column 'kind' names 'c', and the experts are a, b"):
            source(batch(("a", "c")))


class TestTraining:
    def trained(self, folder: Path, teacher: Any, **given: Any) -> dict[str, torch.Tensor]:
        objectives = given.pop("objectives", [CrossEntropy(weight=0.1), Logits()])
        args = tiny.arguments(folder, **given.pop("args", {}))
        made = {"train_dataset": data(), **given}
        trainer = DistillTrainer(tiny.llama("student"), teacher, objectives, args, **made)
        trainer.train()
        return {k: v.clone() for k, v in trainer.student.state_dict().items()}

    def test_twice_the_same_expert_is_that_teacher(self, tmp_path: Path) -> None:
        same = Routed({name: tiny.llama("teacher") for name in "ab"}, by="kind")
        objectives = [CrossEntropy(weight=0.1), Logits(), HiddenStates(layers=auto, rows="valid")]
        one, two = (
            self.trained(tmp_path / str(k), teacher, objectives=objectives)
            for k, teacher in enumerate((same, tiny.llama("teacher")))
        )
        assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-6

    def test_the_column_travels_from_every_kind_of_data(self, tmp_path: Path) -> None:
        rows = [
            row for row in data().to_list() if any(label != -100 for label in row["labels"][1:])
        ]
        table = datasets.Dataset.from_list(rows)
        kinds: list[Any] = [table, rows, table.to_iterable_dataset()]
        ends = [
            self.trained(tmp_path / str(k), routed(), train_dataset=kind)
            for k, kind in enumerate(kinds)
        ]
        for other in ends[1:]:
            assert all(torch.equal(ends[0][k], other[k]) for k in other)
        unused = {"remove_unused_columns": False}
        kept = self.trained(tmp_path / "kept", routed(), args=unused, train_dataset=rows)
        assert all(torch.equal(ends[0][k], kept[k]) for k in kept)

    def test_an_ensemble_of_experts_keeps_the_temperature(self, tmp_path: Path) -> None:
        """Several may be an expert, and a `Routed` a member."""
        a, b = twins()
        inner = Ensemble([a, b])
        made: list[Any] = [Routed({"a": inner, "b": inner}, by="kind"), Ensemble([inner, inner])]
        objectives = [Logits(temperature=3.0)]
        ends = [
            self.trained(tmp_path / str(k), teacher, objectives=objectives)
            for k, teacher in enumerate(made)
        ]
        assert max(float((ends[0][k] - ends[1][k]).abs().max()) for k in ends[0]) < 1e-6
        self.trained(tmp_path / "2", Ensemble([routed(), a]), objectives=objectives)


class TestBadInput:
    def refused(self, folder: Path, message: str, **given: Any) -> None:
        objectives = given.pop("objectives", [Logits()])
        made = {"train_dataset": data(), **given}
        args = tiny.arguments(folder)
        with pytest.raises((InputError, ValueError), match=message):
            DistillTrainer(tiny.llama("student"), routed(), objectives, args, **made)

    def test_a_column_that_is_missing(self, tmp_path: Path) -> None:
        message = "train_dataset has no column 'kind', by which Routed"
        self.refused(tmp_path, message, train_dataset=tiny.rows())
        self.refused(tmp_path, message, train_dataset=tiny.rows().to_iterable_dataset())
        message = r"an example has no column 'kind', which names its teacher; it has \['input_ids'"
        self.refused(tmp_path, message, train_dataset=list(tiny.rows()))
        self.refused(tmp_path, "eval_dataset has no column 'kind'", eval_dataset=tiny.rows(5))

    def test_a_column_that_names_no_expert(self, tmp_path: Path) -> None:
        """Wherever the row is."""
        message = "train_dataset: column 'kind' names 'c', and the experts are a, b; correct the"
        last = data(["a"] * 31 + ["c"])
        self.refused(tmp_path, message, train_dataset=last)
        self.refused(tmp_path, message, train_dataset=last.to_list())

    def test_attention(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "attention of blocks", objectives=[AttentionMaps()])

    def test_members_are_of_an_ensemble(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "there is one: leave it out", objectives=[HiddenStates(member=0)])
