"""Hidden states of a cache in place of the teacher's: the same within 8 bit, in any batch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedModel

from llm_distill import (
    Cached,
    Contrastive,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    Local,
    Logits,
    Routed,
    cka,
    pkt,
    rkd_distance,
)
from llm_distill.binding import make_batch
from llm_distill.cache.estimators import hidden
from llm_distill.cache.frames import FILE
from llm_distill.cache.lookup import Lookup
from llm_distill.caching import Capture, write_cache
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.layers import explicit, last, random, uniform
from llm_distill.losses.sparse import TopK
from llm_distill.objectives import Objective
from llm_distill.preparation import prepare_run
from llm_distill.rows import Batch
from llm_distill.signals import Request
from tests import caches, launch, tiny

CPU = torch.device("cpu")
ROWS = tiny.rows(32, empty=(3,))
PAIRS = partial(explicit, pairs=[[1, 2], [2, 4]])
STATES = Request(hidden=frozenset({2, 4}))
HINT = HiddenStates(layers=PAIRS)
EVERY = HiddenStates(layers=PAIRS, rows="valid")
PLACES = [20, 4, 11]

SHARE = 1e-4
"""Of a state's squared distance from the median that 8 bits may lose, at these sizes."""


def planted() -> PreTrainedModel:
    """A teacher with features that are far larger than others, and a token like a sink."""
    model = tiny.llama("teacher")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 17] += 300.0
        model.model.embed_tokens.weight[:, 40] *= 50.0
        model.model.embed_tokens.weight[7, 5] = 2000.0
    return model


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Caches with states of supervised tokens, of all, and of some directions."""
    folder = tmp_path_factory.mktemp
    return {
        "supervised": caches.written(folder("a"), hidden, hints=[HINT]),
        "valid": caches.written(folder("b"), hidden, hints=[EVERY]),
        "few": caches.written(folder("c"), hidden, hints=[EVERY], width=20),
        "planted": caches.written(folder("d"), hidden, hints=[EVERY], model=planted()),
    }


def batch(places: list[int], collator: Any = None, **settings: Any) -> Batch:
    collate = RowCollator(collator or Collator(pad_token_id=0), shift=True, valid=True, named=True)
    return make_batch(collate([ROWS[k] for k in places]), None, seed=0, epoch=0, **settings)


def live(given: Batch, layer: int, model: PreTrainedModel | None = None) -> Tensor:
    """The teacher's own state: `[B, T, D]`."""
    source = Local(tiny.llama("teacher") if model is None else model).open(STATES, CPU)
    return source(given).states[layer]


def lost(read: Tensor, exact: Tensor) -> float:
    """The worst token, of its squared distance from the mean state."""
    away = (exact - exact.mean(0)).square().sum(1)
    return float(((read - exact).square().sum(1) / away).max())


class TestStates:
    @pytest.mark.parametrize("kind", ["supervised", "valid"])
    @pytest.mark.parametrize("layer", [2, 4])
    def test_they_are_the_teachers(self, paths: dict[str, str], kind: Any, layer: int) -> None:
        given = batch(PLACES)
        rows = given.rows(kind)
        said = Cached(paths[kind]).open(STATES, CPU)(given)
        assert set(said.states) == {2, 4}
        assert said.distribution is None
        exact = live(given, layer).flatten(0, 1)[rows.index]
        assert 0 < lost(said.hidden(layer, rows), exact) < 10 * SHARE
        manifest = Cached(paths[kind]).store.manifest
        assert manifest.lost[str(layer)]["mean"] < SHARE

    def test_what_was_planted_costs_others_nothing(self, paths: dict[str, str]) -> None:
        given = batch(PLACES)
        rows, model = given.rows("valid"), planted()
        said = Cached(paths["planted"]).open(STATES, CPU)(given)
        exact = live(given, 2, model).flatten(0, 1)[rows.index]
        plain = (exact[:, 5].abs() < 1000).nonzero()[:, 0]
        assert 0 < len(plain) < len(exact)
        read, exact = said.hidden(2, rows)[plain], exact[plain]
        error = (read - exact).square().mean(0) / exact.var(0)
        assert error.max() < 30 * SHARE
        step = exact.abs().amax(1, keepdim=True) / 127  # as a scale for each token would
        naive = ((exact / step).round() * step - exact).square().mean(0) / exact.var(0)
        assert naive.median() > 0.2

    def test_where_nothing_was_kept(self, paths: dict[str, str]) -> None:
        given = batch(PLACES)
        states = Cached(paths["supervised"]).open(STATES, CPU)(given).states[2].flatten(0, 1)
        there = torch.zeros(len(states), dtype=torch.bool)
        there[given.supervised.index] = True
        assert states[there].isfinite().all()
        assert states[~there].isnan().all()
        states = Cached(paths["valid"]).open(STATES, CPU)(given).states[2].flatten(0, 1)
        padding = (given.inputs["attention_mask"] == 0).flatten()
        assert padding.any()
        assert (states[padding] == 0).all()
        assert states[~padding].abs().sum(1).all()

    def test_some_directions(self, paths: dict[str, str]) -> None:
        given = batch(PLACES)
        teacher = Cached(paths["few"], states=True, states_width=20)
        said = teacher.open(STATES, CPU)(given)
        read, exact = said.hidden(4, given.rows("valid")), live(given, 4)
        assert read.shape[1] == teacher.spec.width == 64
        assert torch.linalg.matrix_rank(read - read.mean(0), atol=1e-3) == 20
        exact = exact.flatten(0, 1)[given.rows("valid").index]
        known = teacher.store.manifest.lost["4"]
        assert 0.01 < known["mean"] < 0.5
        assert lost(read, exact) < 1.5 * known["worst"]

    @pytest.mark.parametrize("kind", ["supervised", "valid"])
    def test_padding_on_the_left_and_packs(self, paths: dict[str, str], kind: Any) -> None:
        source = Cached(paths[kind]).open(STATES, CPU)
        left = Collator(pad_token_id=0, padding_side="left")
        batches = [batch(PLACES, c) for c in (None, left, DataCollatorWithFlattening())]
        plain, *others = (source(given).hidden(4, given.rows(kind)) for given in batches)
        for other in others:
            assert torch.equal(plain, other)

    @pytest.mark.parametrize("kind", ["supervised", "valid"])
    def test_read_where_batches_are_collated(self, paths: dict[str, str], kind: Any) -> None:
        asked = STATES | Request(logits=True)
        source = Cached(paths[kind]).open(asked, CPU)
        plain = source(batch(PLACES))
        collate = RowCollator(
            Collator(pad_token_id=0),
            shift=True,
            valid=True,
            lookup=Lookup(paths[kind], layers=(2, 4)),
        )
        given = make_batch(collate([ROWS[k] for k in PLACES]), None, seed=0, epoch=0)
        vars(source)["_lookup"] = object()  # nothing is left for it to do
        read = source(given)
        for layer in (2, 4):
            assert read.states[layer].equal(plain.states[layer]) or kind == "supervised"
            rows = given.rows(kind)
            assert read.hidden(layer, rows).equal(plain.hidden(layer, rows))
        assert read.whole.logits(slice(None)).equal(plain.whole.logits(slice(None)))

    @pytest.mark.parametrize("kind", ["supervised", "valid"])
    def test_sequences_that_do_not_count(self, paths: dict[str, str], kind: Any) -> None:
        source = Cached(paths[kind]).open(STATES, CPU)
        whole = source(batch([2, 9]))
        for keep in (0, 1):
            given = batch([2, 9], keep=keep)
            rows = given.rows(kind)
            assert len(rows) == sum(batch([2, 9]).rows(kind).per_sequence[:keep])
            assert source(given).hidden(2, rows).equal(whole.hidden(2, rows))

    def test_some_sequences_of_a_batch(self, paths: dict[str, str]) -> None:
        source = Cached(paths["valid"]).open(STATES, CPU)
        whole, few = batch(PLACES), batch(PLACES).only([0, 2])
        states = source(few).states[2]
        assert states.equal(source(whole).states[2][[0, 2]])

    def test_an_example_that_is_not_there(self, paths: dict[str, str]) -> None:
        collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=True, named=True)
        given = make_batch(collate([{"input_ids": [5, 6, 7]}]), None, seed=0, epoch=0)
        with pytest.raises(InputError, match="1 of the 1 examples of this batch are not in the"):
            Cached(paths["valid"]).open(STATES, CPU)(given)

    def test_a_batch_without_valid_rows(self, paths: dict[str, str]) -> None:
        collate = RowCollator(Collator(pad_token_id=0), shift=True, valid=False, named=True)
        given = make_batch(collate([ROWS[4]]), None, seed=0, epoch=0)
        with pytest.raises(LookupError, match="collated without valid rows"):
            Cached(paths["valid"]).open(STATES, CPU)(given)

    def test_half_precision_stays(self, tmp_path: Path) -> None:
        model = tiny.llama("teacher").bfloat16()
        path = caches.written(tmp_path, hints=[HINT], model=model)
        given = batch(PLACES)
        read = Cached(path).open(STATES, CPU)(given).hidden(4, given.supervised)
        assert read.dtype == torch.bfloat16
        exact = live(given, 4, model).flatten(0, 1)[given.supervised.index]
        assert lost(read.float(), exact.float()) < 10 * SHARE


class TestRefused:
    def test_layers_that_are_not_there(self, paths: dict[str, str]) -> None:
        message = (
            r"the cache .*: a cache \(Cached\) holds the teacher's logits, here as last hidden "
            r"states, and hidden states 2, 4, and hidden states 1, 3 are asked for; run llm-"
            r"distill cache on this recipe with another path"
        )
        for asked in ({1, 3}, {1, 2, 3}):
            with pytest.raises(ValueError, match=message):
                Cached(paths["valid"]).open(Request(hidden=frozenset(asked)), CPU)
        source = Cached(paths["valid"]).open(STATES, CPU)
        with pytest.raises(ValueError, match=r"cache of LlamaForCausalLM: .*hidden states 3 are"):
            source.ask(Request(hidden=frozenset({3})))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"states_width": 16}, "keeps 64 numbers of a hidden state, and the .*: 16"),
            ({"states_width": 64}, None),
            ({}, None),
        ],
    )
    def test_other_states_than_the_recipe_says(
        self, paths: dict[str, str], changes: dict[str, Any], message: str | None
    ) -> None:
        teacher = Cached(paths["valid"], states=True, **changes)
        if message is None:
            assert teacher.spec.depth == 4
            return
        with pytest.raises(InputError, match=message):
            _ = teacher.spec

    def test_a_cache_without_states(self, tmp_path: Path) -> None:
        path = caches.written(tmp_path)
        with pytest.raises(InputError, match="no hidden states of layers, and the recipe says"):
            _ = Cached(path, states=True).spec

    @pytest.mark.parametrize("width", [0, -1, True, 2.5])
    def test_a_width_that_is_none(self, width: Any) -> None:
        with pytest.raises(InputError, match="a number of directions from 1 on, such as 256"):
            Cached("x", states=True, states_width=width)
        with pytest.raises(InputError, match="states_width is 8, and states False"):
            Cached("x", states_width=8)

    def test_a_flipped_bit(self, tmp_path: Path) -> None:
        path = Path(caches.written(tmp_path, hints=[HINT]))
        content = bytearray((path / FILE).read_bytes())
        content[-7] ^= 1
        (path / FILE).write_bytes(bytes(content))
        assert Cached(str(path)).open(Request(logits=True), CPU)
        with pytest.raises(InputError, match=r"states\.safetensors is not as it was written"):
            Cached(str(path)).open(STATES, CPU)
        (path / FILE).unlink()
        with pytest.raises(InputError, match=r"states\.safetensors is missing; copy"):
            Cached(str(path)).open(STATES, CPU)

    def test_closed(self, paths: dict[str, str]) -> None:
        source = Cached(paths["valid"]).open(STATES, CPU)
        source.close()
        with pytest.raises(RuntimeError, match="was closed"):
            source(batch(PLACES))


def trained(
    folder: Path, teacher: Any, objectives: list[Objective], **changes: Any
) -> tuple[DistillTrainer, Tensor]:
    """A student after three steps, and its weights."""
    given: dict[str, Any] = {
        "train_dataset": ROWS.select([k for k in range(24) if k != 3]),
        "eval_dataset": ROWS.select(range(24, 32)),
        "processing_class": tiny.tokenizer(),
    }
    given |= {k: changes.pop(k) for k in list(changes) if k == "data_collator"}
    trainer = DistillTrainer(
        tiny.llama("student"), teacher, objectives, tiny.arguments(folder, **changes), **given
    )
    trainer.announces = False
    trainer.train()
    return trainer, nn.utils.parameters_to_vector(trainer.student.parameters()).detach()


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two students moved alike, and not the same way to the bit."""
    start = nn.utils.parameters_to_vector(tiny.llama("student").parameters()).detach()
    apart = float((ours - theirs).norm() / (theirs - start).norm())
    return 0 < apart < 0.02


def teacher_model() -> Local:
    return Local(tiny.llama("teacher"), tokenizer=tiny.tokenizer())


def projectors(trainer: DistillTrainer) -> list[Tensor]:
    """Weights of the trained parts of all terms."""
    terms = trainer.run.terms.values()
    return [p.detach().clone() for term in terms for p in term.parameters() if p.ndim > 1]


OBJECTIVES: dict[str, Callable[[], list[Objective]]] = {
    "mapped": lambda: [HINT],
    "every token": lambda: [EVERY],
    "rkd": lambda: [HiddenStates(loss=rkd_distance, layers=PAIRS)],
    "pkt": lambda: [HiddenStates(loss=pkt, layers=PAIRS), HiddenStates(layers=last)],
    "cka": lambda: [HiddenStates(loss=cka, layers=PAIRS)],
    "pooled": lambda: [HiddenStates(loss=rkd_distance, items="pooled", layers=PAIRS)],
    "contrastive": lambda: [Contrastive(), Logits()],
    "blockwise": lambda: [HiddenStates(layers=PAIRS, blockwise=0.5), Logits()],
    "random": lambda: [HiddenStates(layers=random)],
    "uniform": lambda: [HiddenStates(layers=uniform, skip=1)],
    "auto": lambda: [HiddenStates(), Contrastive()],
}


class TestTraining:
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_it_trains_as_the_teacher(self, tmp_path: Path, name: str) -> None:
        """Three steps near the live ones; projectors, and what they start at, among them."""
        path = caches.written(tmp_path, hidden, hints=OBJECTIVES[name]())
        one, ours = trained(tmp_path / "a", Cached(path), OBJECTIVES[name]())
        other, theirs = trained(tmp_path / "b", teacher_model(), OBJECTIVES[name]())
        maps = [[t.mapping for t in made.run.terms.values()] for made in (one, other)]
        assert maps[0] == maps[1]
        assert near(ours, theirs)
        for mine, live in zip(projectors(one), projectors(other), strict=True):
            assert (mine - live).norm() < 0.02 * live.norm()
        losses = [made.evaluate()["eval_loss"] for made in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)

    def test_projectors_learn(self, paths: dict[str, str], tmp_path: Path) -> None:
        hint = HiddenStates(layers=PAIRS, rows="valid", init="random")
        before = projectors(trained(tmp_path, Cached(paths["few"]), [hint], learning_rate=0.0)[0])
        made, _ = trained(tmp_path, Cached(paths["few"]), [hint], max_steps=15, learning_rate=0.5)
        after = projectors(made)
        assert len(before) == 2
        assert all((a - b).norm() > 0.01 * b.norm() for a, b in zip(after, before, strict=True))
        losses = [log["loss"] for log in made.state.log_history if "loss" in log]
        assert sum(losses[-3:]) < 0.98 * sum(losses[:3])

    @pytest.mark.parametrize("kind", ["supervised", "valid"])
    def test_batches_of_any_size_and_worker_processes(
        self, paths: dict[str, str], tmp_path: Path, kind: str
    ) -> None:
        objectives: list[Objective] = [HINT, Logits()]
        _, whole = trained(tmp_path / "a", Cached(paths[kind]), objectives)
        _, parts = trained(
            tmp_path / "b",
            Cached(paths[kind]),
            objectives,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            dataloader_num_workers=1,
        )
        assert (whole - parts).abs().max() < 1e-6

    def test_packed(self, paths: dict[str, str], tmp_path: Path) -> None:
        """What is supervised and its states are the same; so are the steps."""
        packing = {
            "data_collator": DataCollatorWithFlattening(),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        }
        made, packed = trained(tmp_path / "a", Cached(paths["valid"]), [EVERY], **packing)
        _, theirs = trained(tmp_path / "b", teacher_model(), [EVERY], **packing)
        assert made.state.global_step == 3
        assert near(packed, theirs)

    def test_it_resumes_bit_exactly(self, paths: dict[str, str], tmp_path: Path) -> None:
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        _, whole = trained(tmp_path / "a", Cached(paths["valid"]), [EVERY], **saving)
        trainer = DistillTrainer(
            tiny.llama("student"),
            Cached(paths["valid"]),
            [EVERY],
            tiny.arguments(tmp_path / "a", **saving),
            train_dataset=ROWS.select(range(24)),
            processing_class=tiny.tokenizer(),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert nn.utils.parameters_to_vector(trainer.student.parameters()).equal(whole)

    def test_two_ranks_train_as_one(self, paths: dict[str, str], tmp_path: Path) -> None:
        for name, ranks in (("one", 1), ("two", 2)):
            launch.launch(
                "tests.cached_worker", paths["valid"], str(tmp_path / name), "hints", ranks=ranks
            )
        one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
        assert (one - two).abs().max() < 1e-6

    def test_logits_alone_read_no_states(
        self, paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llm_distill.cache.lookup.coded", None)
        trained(tmp_path, Cached(paths["valid"]), [Logits()])

    def test_it_says_what_it_has(self, paths: dict[str, str], tmp_path: Path) -> None:
        made, _ = trained(tmp_path, Cached(paths["few"]), [EVERY])
        told = made.run.told[0]
        assert "hidden states 2, 4 of all tokens, 20 of 64 numbers in 8 bit" in told


class TestAmongOthers:
    def test_hints_of_a_member(self, paths: dict[str, str], tmp_path: Path) -> None:
        hint = HiddenStates(layers=PAIRS, member=1)
        weights = []
        for name, first in (("a", Cached(paths["valid"])), ("b", teacher_model())):
            team = Ensemble([teacher_model(), first])
            weights.append(trained(tmp_path / name, team, [hint])[1])
        assert near(weights[0], weights[1])

    def test_a_route_of_caches(self, paths: dict[str, str]) -> None:
        cached = Cached(paths["valid"])
        team = Routed(by="domain", experts={"a": cached, "b": cached})
        given = batch(PLACES)
        columns = {"domain": ("a", "b", "a")}
        asked = Batch(
            given.inputs,
            given.supervised,
            given.valid,
            draw=given.draw,
            examples=given.examples,
            columns=columns,
        )
        read = team.open(STATES, CPU)(asked).hidden(4, given.supervised)
        assert read.equal(cached.open(STATES, CPU)(given).hidden(4, given.supervised))


def test_top_k_beside_states(tmp_path: Path) -> None:
    path = caches.written(tmp_path, hints=[HINT])
    given = batch(PLACES)
    said = Cached(path).open(STATES | Request(logits=True), CPU)(given)
    assert isinstance(said.logits, TopK)
    assert len(said.logits) == len(given.supervised) == len(said.hidden(2, given.supervised))


def test_masked_models(tmp_path: Path) -> None:
    """They are hinted at every token; in some examples nothing is masked."""
    rows = [
        {"input_ids": [5 + k, 3, 7, 3], "labels": [-100, 9 if k % 3 else -100, -100, -100]}
        for k in range(12)
    ]
    teacher = Local(tiny.bert(width=48), tokenizer=tiny.tokenizer())
    hint = HiddenStates(layers=uniform)
    args = tiny.arguments(tmp_path / "out")
    given: dict[str, Any] = {
        "train_dataset": datasets.Dataset.from_list(rows),
        "processing_class": tiny.tokenizer(),
        "data_collator": Collator(pad_token_id=0),
    }
    run = prepare_run(tiny.bert(), teacher, [hint], args, given)
    cached = Cached(str(tmp_path / "cache"), of=teacher, keep=hidden, states=True)
    manifest = write_cache(Capture(run, cached, args))
    assert manifest.layers is not None
    assert manifest.layers.rows == "valid"
    assert sum(shard.examples for shard in manifest.shards) == 12
    weights = []
    for master in (Cached(cached.path), teacher):
        trainer = DistillTrainer(tiny.bert(), master, [hint], args, **given)
        trainer.announces = False
        trainer.train()
        weights.append(nn.utils.parameters_to_vector(trainer.student.parameters()).detach())
    start = nn.utils.parameters_to_vector(tiny.bert().parameters()).detach()
    assert 0 < (weights[0] - weights[1]).norm() < 0.02 * (weights[1] - start).norm()
