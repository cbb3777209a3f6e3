"""What a cached teacher refuses before the first step, each with what differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import llm_distill.trainer
from llm_distill import (
    AttentionMaps,
    BornAgain,
    Cached,
    CrossEntropy,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    Local,
    Logits,
    Relations,
    Routed,
    Taid,
    recall,
    reverse_kl,
)
from llm_distill.cache.estimator import Estimator
from llm_distill.cache.estimators import hidden, hybrid, sampled, topk
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import uniform
from llm_distill.objectives import Objective
from tests import caches, tiny

ROWS = tiny.rows(32, empty=(3,))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Caches of some kinds."""
    kinds: dict[str, Any] = {"topk": caches.TOP, "sampled": sampled, "hidden": hidden}
    made = ((name, tmp_path_factory.mktemp(name), keep) for name, keep in kinds.items())
    return {name: caches.written(folder, keep) for name, folder, keep in made}


def trainer(
    folder: Path, teacher: Any, objectives: Sequence[Objective] = (Logits(),), **changes: Any
) -> DistillTrainer:
    given: dict[str, Any] = {
        "train_dataset": ROWS.select(range(24)),
        "eval_dataset": ROWS.select(range(24, 32)),
        "processing_class": tiny.tokenizer(),
        "model": tiny.llama("student"),
    }
    given |= changes
    if isinstance(teacher, str):
        teacher = Cached(teacher)
    return DistillTrainer(given.pop("model"), teacher, objectives, tiny.arguments(folder), **given)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Everything is refused before weights load."""
    if "allowed" not in request.node.name:
        monkeypatch.setattr(llm_distill.trainer, "load_student", None)


def served(estimator: Estimator, objective: Objective) -> None:
    """Nothing, or why not."""
    spec = Local(tiny.llama("student")).spec
    terms = {"it": objective.build(spec, spec)}
    recall.check_objectives(estimator, [objective], terms, spec, spec)


class TestTerms:
    @pytest.mark.parametrize(
        ("kind", "objective", "message"),
        [
            (
                "topk",
                HiddenStates(),
                "HiddenStates: a cache .*hidden states .*keep to CrossEntropy and Logits",
            ),
            ("hidden", AttentionMaps(layers=uniform), "AttentionMaps: .*the attention of blocks"),
            ("hidden", Relations(), "Relations: a cache .* are asked for"),
            (
                "sampled",
                Logits(loss=reverse_kl),
                "Logits: the cache keeps 50 draws; .*forward_kl at",
            ),
            (
                "sampled",
                Logits(temperature=2.0),
                "Logits: the cache keeps 50 draws; .*temperature 1",
            ),
            ("sampled", Logits(target=Taid()), "Logits: the cache keeps 50 draws"),
        ],
    )
    def test_what_a_cache_cannot_serve(
        self, paths: dict[str, str], tmp_path: Path, kind: str, objective: Objective, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, paths[kind], [objective])

    def test_samples_of_a_hybrid_as_well(self) -> None:
        message = r"top 8 and 42 draws from the tail; .*keep: hidden"
        with pytest.raises(InputError, match=message):
            served(hybrid(), Logits(loss=reverse_kl))
        for kind in (topk(), hidden()):
            served(kind, Logits(loss=reverse_kl))

    def test_cross_entropy_reads_no_teacher(self) -> None:
        served(sampled(), CrossEntropy())

    @pytest.mark.parametrize("kind", ["topk", "sampled", "hidden"])
    def test_what_it_serves_allowed(self, paths: dict[str, str], tmp_path: Path, kind: str) -> None:
        made = trainer(tmp_path, paths[kind], [Logits(), CrossEntropy(weight=0.1)])
        assert f"teacher: the cache {paths[kind]}" in made.run.told[0]

    def test_a_warm_tail_is_said_to_be_an_approximation(
        self, paths: dict[str, str], tmp_path: Path
    ) -> None:
        warm = [Logits(temperature=2.0)]
        assert any("tempered as one token" in x for x in recall.told(Cached(paths["topk"]), warm))
        assert len(recall.told(Cached(paths["hidden"]), warm)) == 1
        assert recall.told(Local(tiny.llama("teacher")), warm) == ()
        assert tmp_path.exists()


class TestData:
    def test_cut_at_another_length(self, paths: dict[str, str], tmp_path: Path) -> None:
        def shorter(row: dict[str, list[int]]) -> dict[str, list[int]]:
            return {name: tokens[:20] for name, tokens in row.items()}

        message = (
            r"train_dataset: \d+ of \d+ examples are not in the cache .*at most 20 long now, 24 "
            r"there\. The data, their order in blocks, the chat template or max_length changed"
        )
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, paths["topk"], train_dataset=ROWS.select(range(24)).map(shorter))

    def test_blocks_of_another_order(self, paths: dict[str, str], tmp_path: Path) -> None:
        def turned(row: dict[str, list[int]]) -> dict[str, list[int]]:
            return {name: tokens[::-1] for name, tokens in row.items()}

        with pytest.raises(InputError, match=r"train_dataset: .* examples are not in the cache"):
            trainer(tmp_path, paths["topk"], train_dataset=ROWS.select(range(24)).map(turned))

    def test_a_single_other_example(self, paths: dict[str, str], tmp_path: Path) -> None:
        changed = ROWS.select(range(24)).to_list()
        changed[7]["input_ids"][-1] = 5 + changed[7]["input_ids"][-1] % 50
        changed[7]["labels"][-1] = changed[7]["input_ids"][-1]
        message = (
            r"1 of 23 examples are not in the cache .*the first is number 6 .*there are as many"
        )
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, paths["topk"], train_dataset=datasets.Dataset.from_list(changed))

    def test_something_else_supervised(self, paths: dict[str, str], tmp_path: Path) -> None:
        every = ROWS.select(range(24)).remove_columns("labels")
        with pytest.raises(InputError, match=r"supervised tokens now, [\d,]+ there"):
            trainer(tmp_path, paths["topk"], train_dataset=every)

    def test_evaluation_data_that_was_not_cached(
        self, paths: dict[str, str], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=r"eval_dataset: .* examples are not in the cache"):
            trainer(tmp_path, paths["topk"], eval_dataset=tiny.rows(40).select(range(33, 40)))
        alone = caches.written(tmp_path, eval_dataset=None)
        with pytest.raises(InputError, match=r"holds no eval data \(train alone\)"):
            trainer(tmp_path, alone)

    def test_less_and_in_another_order_allowed(self, paths: dict[str, str], tmp_path: Path) -> None:
        given = ROWS.select([9, 2, 20, 2, 25])
        assert trainer(tmp_path, paths["topk"], train_dataset=given).run.teacher

    def test_a_list_of_examples_and_a_collator_of_ones_own_allowed(
        self, paths: dict[str, str], tmp_path: Path
    ) -> None:
        given = {"train_dataset": ROWS.select([9, 2]).to_list(), "eval_dataset": None}
        own: dict[str, Any] = {"data_collator": partial(_pad, token=3)}
        assert trainer(tmp_path, paths["topk"], **given, **own).run.teacher

    def test_a_list_with_a_stranger(self, paths: dict[str, str], tmp_path: Path) -> None:
        given = [*ROWS.select([9, 2]).to_list(), {"input_ids": [4, 5, 6]}]
        with pytest.raises(InputError, match="1 of 3 examples are not in the cache"):
            trainer(tmp_path, paths["topk"], train_dataset=given)


class TestTokenizers:
    def test_another_one(self, paths: dict[str, str], tmp_path: Path) -> None:
        other = tiny.tokenizer()
        other.add_tokens(["<new>"])
        bigger = tiny.llama("student", vocabulary=140)
        with pytest.raises(InputError, match="tokenizer"):
            trainer(tmp_path, paths["topk"], processing_class=other, model=bigger)

    def test_what_differs_is_said(self, paths: dict[str, str]) -> None:
        other = tiny.tokenizer(100)
        message = "was written with another tokenizer: .*token 100 is None for the student"
        with pytest.raises(InputError, match=message):
            recall._check_tokenizer(Cached(paths["topk"]), other)

    def test_another_chat_template(self, paths: dict[str, str], tmp_path: Path) -> None:
        other = tiny.tokenizer()
        other.chat_template = "{{ messages }}"
        with pytest.raises(InputError, match="was written with another chat template"):
            trainer(tmp_path, paths["topk"], processing_class=other)

    def test_a_student_with_fewer_tokens(self, tmp_path: Path) -> None:
        path = caches.written(tmp_path)
        small = tiny.llama("student", vocabulary=120)
        with pytest.raises(InputError, match="120"):
            trainer(tmp_path, path, model=small)


class TestFiles:
    @pytest.mark.parametrize("name", ["train-00000.parquet", "index.npy"])
    def test_a_flipped_bit(self, tmp_path: Path, name: str) -> None:
        path = caches.written(tmp_path)
        content = bytearray((Path(path) / name).read_bytes())
        content[len(content) // 2] ^= 8
        (Path(path) / name).write_bytes(bytes(content))
        with pytest.raises(InputError, match=f"{name} is not as it was written"):
            trainer(tmp_path, path)

    def test_a_shard_cut_short(self, tmp_path: Path) -> None:
        path = caches.written(tmp_path)
        shard = Path(path) / "train-00000.parquet"
        shard.write_bytes(shard.read_bytes()[:-9])
        with pytest.raises(InputError, match="bytes and was written with"):
            trainer(tmp_path, path)

    def test_no_manifest(self, tmp_path: Path) -> None:
        path = caches.written(tmp_path)
        (Path(path) / "manifest.json").unlink()
        with pytest.raises(InputError, match=r"holds no cache \(manifest\.json is missing\)"):
            trainer(tmp_path, path)


class TestAmongOthers:
    """A cache that is one of several teachers is looked at as one alone, before weights load."""

    def beside(self, path: str) -> Ensemble:
        return Ensemble([Cached(path), Cached(path)])

    def test_another_chat_template(self, paths: dict[str, str], tmp_path: Path) -> None:
        other = tiny.tokenizer()
        other.chat_template = "{{ messages }}"
        with pytest.raises(InputError, match="was written with another chat template"):
            trainer(tmp_path, self.beside(paths["topk"]), processing_class=other)

    def test_terms_that_it_cannot_serve(self, paths: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Logits: the cache keeps 50 draws"):
            trainer(tmp_path, self.beside(paths["sampled"]), [Logits(loss=reverse_kl)])

    def test_other_examples(self, paths: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="examples are not in the cache"):
            trainer(
                tmp_path,
                self.beside(paths["topk"]),
                train_dataset=tiny.rows(40).select(range(33, 40)),
            )

    def test_those_of_an_expert_are_looked_up_later(self, paths: dict[str, str]) -> None:
        routed = Routed({"a": Cached(paths["topk"]), "b": Cached(paths["topk"])}, by="kind")
        assert len(recall.caches(routed)) == 2
        assert recall.caches(routed, experts=False) == ()
        assert len(recall.caches(Ensemble([routed, Cached(paths["topk"])]), experts=False)) == 1


@dataclass(frozen=True)
class Both:
    """A teacher made of teachers."""

    members: tuple[object, ...]


def test_who_looks_up(paths: dict[str, str]) -> None:
    cached, local = Cached(paths["topk"]), Local(tiny.llama("teacher"))
    assert recall.caches(cached)
    assert recall.caches(Both((local, cached)))
    assert recall.caches(Both(({"math": cached},)))
    assert not recall.caches(local)
    assert not recall.caches(BornAgain())
    assert not recall.caches(Both((local,)))


def _pad(examples: Sequence[Any], token: int = 0) -> dict[str, torch.Tensor]:
    """A collator that only does as ours."""
    return Collator(pad_token_id=token, padding_side="left")(examples)
