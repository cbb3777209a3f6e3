"""A cached teacher in place of the teacher: the same training, in any order, on any ranks."""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedModel

from llm_distill import (
    Cached,
    CrossEntropy,
    DistillTrainer,
    FromTeacher,
    Local,
    Logits,
    jsd,
    reverse_kl,
)
from llm_distill.binding import make_batch
from llm_distill.cache.estimators import hidden, hybrid, sampled, topk
from llm_distill.cache.manifest import FILE, Manifest
from llm_distill.cache.store import Store
from llm_distill.caching import Capture, write_cache
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.losses.sparse import Counts, TopK
from llm_distill.preparation import prepare_run
from llm_distill.rows import Batch
from llm_distill.signals import Factored, Request
from llm_distill.teachers import Source, Teacher
from tests import caches, launch, tiny

LOGITS = Request(logits=True)
CPU = torch.device("cpu")
ROWS = tiny.rows(32, empty=(3,))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of each kind."""
    kinds: dict[str, Any] = {
        "topk": caches.TOP,
        "whole": partial(topk, k=tiny.VOCABULARY),
        "sampled": partial(sampled, n=20),
        "hybrid": partial(hybrid, m=4, n=12),
        "hidden": hidden,
    }
    made = ((name, tmp_path_factory.mktemp(name), keep) for name, keep in kinds.items())
    return {name: caches.written(folder, keep) for name, folder, keep in made}


def batch(places: list[int], collator: Any = None, **settings: Any) -> Batch:
    collate = RowCollator(collator or Collator(pad_token_id=0), shift=True, valid=False, named=True)
    return make_batch(collate([ROWS[k] for k in places]), None, seed=0, epoch=0, **settings)


def live(given: Batch) -> Tensor:
    """The teacher's own logits of the rows."""
    source = Local(tiny.llama("teacher")).open(LOGITS, CPU)
    return source(given).whole.logits(slice(None))


class TestSpec:
    def test_it_is_a_teacher_of_what_it_was_written_from(self, paths: dict[str, str]) -> None:
        teacher = Cached(paths["topk"])
        assert isinstance(teacher, Teacher)
        assert isinstance(teacher.open(LOGITS, CPU).model, type(None))
        spec = teacher.spec
        assert (spec.name, spec.depth, spec.width) == ("LlamaForCausalLM", 4, 64)
        assert spec.vocabulary == tiny.VOCABULARY
        assert teacher.config.num_hidden_layers == 4
        tokenizer = teacher.find_tokenizer()
        assert tokenizer is not None
        assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()

    def test_a_name_is_a_local(self, tmp_path: Path) -> None:
        assert Cached(str(tmp_path), of="me/teacher").of == Local("me/teacher")
        assert Cached("~/cache").path == os.path.expanduser("~/cache")  # noqa: PTH111
        assert str(Cached("x").estimator) == "top 64 and the tail"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"of": "me/other"},
                "of the teacher LlamaForCausalLM, and the recipe says me/other",
            ),
            ({"keep": sampled}, "keeps top 16 and the tail, and the recipe says 50 draws"),
            ({"keep": partial(topk, k=8)}, "keeps top 16 and the tail, .* says top 8 and"),
        ],
    )
    def test_another_one_than_the_recipe_says(
        self, paths: dict[str, str], changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            _ = Cached(paths["topk"], **changes).spec

    def test_another_commit(self, paths: dict[str, str], tmp_path: Path) -> None:
        of = Local(tiny.llama("teacher"), revision="a" * 40)
        with pytest.raises(InputError, match="is of revision None of its teacher, and the recipe"):
            _ = Cached(paths["topk"], of=of).spec
        assert Cached(paths["topk"], of=Local(tiny.llama("teacher"), revision="main")).spec

    def test_one_in_other_bits(self, paths: dict[str, str], tmp_path: Path) -> None:
        """A quantised teacher is another teacher."""
        name = Cached(paths["topk"]).spec.name
        of = Local(name, quantize="torchao_int8")
        with pytest.raises(InputError, match=r"with all its bits, and the recipe says .* in torch"):
            _ = Cached(paths["topk"], of=of).spec
        small = tmp_path / "small"
        shutil.copytree(paths["topk"], small)
        manifest = replace(Manifest.read(small / FILE), quantised="torchao_int8")
        manifest.write(small / FILE)
        assert Cached(str(small), of=of).spec
        assert Cached(str(small)).spec
        with pytest.raises(
            InputError, match=r"in torchao_int8, and the recipe .* with all its bits"
        ):
            _ = Cached(str(small), of=name).spec

    def test_the_same_as_the_recipe_says(self, paths: dict[str, str]) -> None:
        assert Cached(paths["topk"], of=Local(tiny.llama("teacher")), keep=caches.TOP).spec

    def test_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"is missing.*write it first: llm-distill cache"):
            _ = Cached(str(tmp_path)).spec


class TestSource:
    def test_hidden_states_give_the_teachers_logits(self, paths: dict[str, str]) -> None:
        given = batch([20, 4, 11])
        said = Cached(paths["hidden"]).open(LOGITS, CPU)(given)
        assert isinstance(said.logits, Factored)
        assert torch.allclose(said.whole.logits(slice(None)), live(given), atol=1e-5)

    def test_top_k_of_any_batch(self, paths: dict[str, str]) -> None:
        given = batch([20, 4, 27, 11])
        said = Cached(paths["topk"]).open(LOGITS, CPU)(given).logits
        assert isinstance(said, TopK)
        exact = TopK.of(live(given), 16)
        assert torch.equal(said.ids, exact.ids.sort(-1).values)

    @pytest.mark.parametrize("kind", ["sampled", "hybrid"])
    def test_draws_of_any_batch(self, paths: dict[str, str], kind: str) -> None:
        source = Cached(paths[kind]).open(LOGITS, CPU)
        together = cast("Counts", source(batch([20, 4])).logits)
        alone = cast("Counts", source(batch([4])).logits)
        dense = [
            torch.zeros(len(c), tiny.VOCABULARY).scatter_add_(1, c.ids, c.counts / c.draws)
            for c in (together, alone)
        ]
        assert torch.equal(dense[0][-len(alone) :], dense[1])

    def test_padding_on_the_left_and_packs(self, paths: dict[str, str]) -> None:
        source = Cached(paths["topk"]).open(LOGITS, CPU)
        plain = cast("TopK", source(batch([2, 9, 5])).logits)
        left = cast(
            "TopK", source(batch([2, 9, 5], Collator(pad_token_id=0, padding_side="left"))).logits
        )
        packed = cast("TopK", source(batch([2, 9, 5], DataCollatorWithFlattening())).logits)
        assert torch.equal(plain.log_probs, left.log_probs)
        assert torch.equal(plain.log_probs, packed.log_probs)

    def test_sequences_that_do_not_count(self, paths: dict[str, str]) -> None:
        source = Cached(paths["topk"]).open(LOGITS, CPU)
        whole, first = batch([2, 9]), batch([2, 9], keep=1)
        assert len(source(first).logits) == whole.supervised.per_sequence[0]
        for path in paths.values():
            assert len(Cached(path).open(LOGITS, CPU)(batch([2, 9], keep=0)).logits) == 0

    def test_an_example_without_rows_is_not_looked_up(self, paths: dict[str, str]) -> None:
        given = batch([3, 2])
        assert given.supervised.per_sequence[0] == 0
        assert len(Cached(paths["topk"]).open(LOGITS, CPU)(given).logits) == len(given.supervised)

    def test_an_example_that_is_not_there(self, paths: dict[str, str]) -> None:
        collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=False, named=True)
        other = [{"input_ids": [5, 6, 7]}, ROWS[0]]
        given = make_batch(collate(other), None, seed=0, epoch=0)
        with pytest.raises(InputError, match="1 of the 2 examples of this batch are not in the"):
            Cached(paths["topk"]).open(LOGITS, CPU)(given)

    def test_a_batch_without_names(self, paths: dict[str, str]) -> None:
        collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=False)
        given = make_batch(collate([ROWS[0]]), None, seed=0, epoch=0)
        with pytest.raises(LookupError, match=r"RowCollator\(named=True\)"):
            Cached(paths["topk"]).open(LOGITS, CPU)(given)

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (
                Request(hidden=frozenset({4, 2})),
                r"the cache .*: a cache \(Cached\) holds .* hidden states 2, 4 are asked",
            ),
            (
                Request(heads=frozenset({3})),
                "the attention of blocks 3 are asked for; keep to CrossEntropy",
            ),
        ],
    )
    def test_what_no_cache_holds(
        self, paths: dict[str, str], request_: Request, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            Cached(paths["hidden"]).open(request_ | LOGITS, CPU)
        source = Cached(paths["hidden"]).open(LOGITS, CPU)
        with pytest.raises(ValueError, match="cache of LlamaForCausalLM: a cache"):
            source.ask(request_)

    def test_nothing_asked_nothing_read(self, paths: dict[str, str]) -> None:
        source: Source = Cached(paths["topk"]).open(LOGITS, CPU)
        source.ask(Request())
        assert source(batch([1])).distribution is None

    def test_closed(self, paths: dict[str, str]) -> None:
        source = Cached(paths["topk"]).open(LOGITS, CPU)
        source.close()
        source.close()
        with pytest.raises(RuntimeError, match="was closed"):
            source(batch([1]))

    def test_files_are_compared_once(
        self, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[bool] = []
        verify = Store.verify

        def counted(store: Store, *, shown: bool) -> None:
            calls.append(shown)
            verify(store)

        monkeypatch.setattr(Store, "verify", counted)
        teacher = Cached(paths["topk"])
        teacher.open(LOGITS, CPU)
        teacher.open(LOGITS, CPU)
        Cached(paths["topk"], verify=False).open(LOGITS, CPU)
        assert calls == [True]


def trained(
    folder: Path, teacher: Any, objectives: Any = None, **changes: Any
) -> tuple[DistillTrainer, Tensor]:
    """A student after three steps, and its weights."""
    given = {
        "train_dataset": ROWS.select(range(24)),
        "eval_dataset": ROWS.select(range(24, 32)),
        "processing_class": tiny.tokenizer(),
    }
    trainer = DistillTrainer(
        tiny.llama("student"),
        teacher,
        objectives or [CrossEntropy(weight=0.1), Logits()],
        tiny.arguments(folder, **changes),
        **cast("Any", given),
    )
    trainer.announces = False
    trainer.train()
    return trainer, nn.utils.parameters_to_vector(trainer.student.parameters()).detach()


def teacher_model() -> Local:
    return Local(tiny.llama("teacher"), tokenizer=tiny.tokenizer())


class TestTraining:
    @pytest.mark.parametrize(
        "objective",
        [Logits(), Logits(temperature=3.0), Logits(loss=reverse_kl), Logits(loss=jsd)],
        ids=["forward", "warm", "reverse", "jsd"],
    )
    def test_hidden_states_train_as_the_teacher(
        self, paths: dict[str, str], tmp_path: Path, objective: Logits
    ) -> None:
        one, ours = trained(tmp_path / "a", Cached(paths["hidden"]), [objective])
        other, theirs = trained(tmp_path / "b", teacher_model(), [objective])
        assert (ours - theirs).abs().max() < 1e-6
        for name in ("eval_kl", "eval_agreement", "eval_teacher_perplexity"):
            assert one.evaluate()[name] == pytest.approx(other.evaluate()[name], rel=1e-4)

    def test_all_tokens_of_top_k_train_as_the_teacher(
        self, paths: dict[str, str], tmp_path: Path
    ) -> None:
        """With k = V nothing is merged: what is left is the rounding of 8 bits."""
        start = nn.utils.parameters_to_vector(tiny.llama("student").parameters())
        _, ours = trained(tmp_path / "a", Cached(paths["whole"]))
        _, theirs = trained(tmp_path / "b", teacher_model())
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()

    @pytest.mark.parametrize("kind", ["topk", "sampled", "hybrid"])
    def test_losses_fall(self, paths: dict[str, str], tmp_path: Path, kind: str) -> None:
        trainer, _ = trained(tmp_path, Cached(paths[kind]), max_steps=20, learning_rate=0.1)
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
        assert trainer.evaluate()["eval_kl"] > 0

    def test_shuffled_it_finds_its_own(self, paths: dict[str, str], tmp_path: Path) -> None:
        shuffled = {"train_sampling_strategy": "random", "num_train_epochs": 2, "max_steps": -1}
        _, ours = trained(tmp_path / "a", Cached(paths["hidden"]), **shuffled)
        _, theirs = trained(tmp_path / "b", teacher_model(), **shuffled)
        assert (ours - theirs).abs().max() < 1e-6

    def test_batches_of_any_size_and_worker_processes(
        self, paths: dict[str, str], tmp_path: Path
    ) -> None:
        _, whole = trained(tmp_path / "a", Cached(paths["topk"]))
        _, parts = trained(
            tmp_path / "b",
            Cached(paths["topk"]),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            dataloader_num_workers=1,
        )
        assert (whole - parts).abs().max() < 1e-6

    @pytest.mark.parametrize("kind", ["topk", "sampled", "hidden"])
    def test_targets_are_read_where_batches_are_collated(
        self, paths: dict[str, str], tmp_path: Path, kind: str
    ) -> None:
        trainer = trained(tmp_path / "a", Cached(paths[kind]), max_steps=1)[0]
        source = cast("Any", trainer._source)
        source._lookup = object()  # nothing is left for it to do
        trainer.train()
        assert trainer.evaluate()["eval_kl"] > 0

    @pytest.mark.parametrize("kind", ["topk", "hybrid"])
    def test_it_resumes_bit_exactly(self, paths: dict[str, str], tmp_path: Path, kind: str) -> None:
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        _, whole = trained(tmp_path / "a", Cached(paths[kind]), **saving)
        trainer = DistillTrainer(
            tiny.llama("student"),
            Cached(paths[kind]),
            [CrossEntropy(weight=0.1), Logits()],
            tiny.arguments(tmp_path / "a", **saving),
            train_dataset=ROWS.select(range(24)),
            processing_class=tiny.tokenizer(),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        again = nn.utils.parameters_to_vector(trainer.student.parameters())
        assert torch.equal(again, whole)

    def test_the_card_names_the_teacher(self, paths: dict[str, str], tmp_path: Path) -> None:
        trainer, _ = trained(tmp_path, Cached(paths["topk"]))
        assert trainer.card_facts().teacher.name == "LlamaForCausalLM"
        assert any(
            "the cache" in line and "top 16 and the tail" in line for line in trainer.run.told
        )

    def test_two_ranks_train_as_one(self, paths: dict[str, str], tmp_path: Path) -> None:
        launch.launch("tests.cached_worker", paths["hybrid"], str(tmp_path / "one"))
        launch.launch("tests.cached_worker", paths["hybrid"], str(tmp_path / "two"), ranks=2)
        one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
        assert (one - two).abs().max() < 1e-6


def test_masked_models(tmp_path: Path) -> None:
    """What is masked stays masked: rows predict the token itself."""
    rows = [{"input_ids": [5 + k, 3, 7, 3], "labels": [-100, 9, -100, 11 + k]} for k in range(8)]
    data = datasets.Dataset.from_list(rows)
    teacher = Local(tiny.bert(width=48), tokenizer=tiny.tokenizer())
    given: dict[str, Any] = {
        "train_dataset": data,
        "processing_class": tiny.tokenizer(),
        "data_collator": Collator(pad_token_id=0),
    }
    args = tiny.arguments(tmp_path / "out")
    run = prepare_run(tiny.bert(), teacher, [Logits()], args, given)
    write_cache(Capture(run, Cached(str(tmp_path / "cache"), keep=hidden), args))
    weights = []
    for master in (Cached(str(tmp_path / "cache")), teacher):
        student: PreTrainedModel = tiny.bert()
        trainer = DistillTrainer(student, master, [Logits()], args, **given)
        trainer.announces = False
        trainer.train()
        weights.append(nn.utils.parameters_to_vector(student.parameters()).detach())
    assert (weights[0] - weights[1]).abs().max() < 1e-6


def test_a_student_cut_from_a_teacher_that_is_not_here(
    paths: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the teacher is a Cached, whose weights are not here"):
        DistillTrainer(
            FromTeacher(depth=2),
            Cached(paths["topk"]),
            [Logits()],
            tiny.arguments(tmp_path),
            train_dataset=ROWS.select(range(24)),
        )
