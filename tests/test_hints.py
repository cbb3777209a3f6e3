"""Which states a cache has to hold for objectives on layers, and whose maps it decided."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llm_distill import (
    AttentionMaps,
    Cached,
    Contrastive,
    CrossEntropy,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    Local,
    Logits,
    hints,
    rkd_distance,
)
from llm_distill.binding import bind
from llm_distill.errors import InputError
from llm_distill.layers import (
    LayerMap,
    auto_race,
    coverage,
    explicit,
    learned,
    random,
    segmentation,
    transport,
    uniform,
)
from llm_distill.layers import cka as similar
from llm_distill.objectives import Objective
from llm_distill.signals import ModelSpec, Request
from tests import caches, tiny

if TYPE_CHECKING:
    from collections.abc import Sequence

PAIRS = partial(explicit, pairs=[[1, 2], [2, 4]])
STUDENT = Local(tiny.llama("student")).spec
TEACHER = Local(tiny.llama("teacher")).spec


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Caches without states, of supervised tokens, of all, and on a map that it decided."""
    given: dict[str, Sequence[Objective]] = {
        "none": [],
        "supervised": [HiddenStates(layers=PAIRS)],
        "valid": [HiddenStates(layers=PAIRS, rows="valid")],
        "decided": [HiddenStates(), Contrastive(layers=coverage)],
    }
    return {
        name: caches.written(tmp_path_factory.mktemp(name), hints=objectives)
        for name, objectives in given.items()
    }


def terms(*objectives: Objective) -> dict[str, Any]:
    return bind(objectives, STUDENT, TEACHER, seed=0)


def trainer(folder: Path, teacher: Any, *objectives: Objective, **changes: Any) -> DistillTrainer:
    given: dict[str, Any] = {"model": tiny.llama("student")} | changes
    return DistillTrainer(
        given.pop("model"),
        teacher,
        objectives,
        tiny.arguments(folder),
        train_dataset=tiny.rows(32, empty=(3,)).select([k for k in range(24) if k != 3]),
        processing_class=tiny.tokenizer(),
        **given,
    )


class TestMaps:
    def test_they_are_taken_from_the_cache(self, paths: dict[str, str], tmp_path: Path) -> None:
        asked = HiddenStates(), Contrastive(layers=coverage)
        live = trainer(
            tmp_path / "a", Local(tiny.llama("teacher"), tokenizer=tiny.tokenizer()), *asked
        )
        made = trainer(tmp_path / "b", Cached(paths["decided"]), *asked)
        for name, term in made.run.terms.items():
            assert isinstance(term.mapping, LayerMap)
            assert term.mapping == live.run.terms[name].mapping
        assert not (tmp_path / "b" / "calibration.safetensors").exists()

    def test_a_map_by_hand_on_the_same_layers(self, paths: dict[str, str], tmp_path: Path) -> None:
        held = Cached(paths["decided"]).store.manifest.layers
        assert held is not None
        pairs = [[1, held.layers[0]], [2, held.layers[-1]]]
        assert trainer(
            tmp_path, Cached(paths["decided"]), HiddenStates(layers=partial(explicit, pairs=pairs))
        )

    @pytest.mark.parametrize(
        ("kind", "objective", "message"),
        [
            (
                "supervised",
                HiddenStates(),
                r"HiddenStates: layers: auto looks at the teacher, and the cache .* decided no map "
                r"for it; run llm-distill cache on this recipe, or write a map: layers: uniform",
            ),
            (
                "decided",
                HiddenStates(layers=segmentation),
                "layers: segmentation looks at the teacher, and the cache .* decided auto for it",
            ),
            (
                "decided",
                HiddenStates(name="other"),
                "other: layers: auto looks at the teacher, and the cache .* decided no map",
            ),
            (
                "decided",
                HiddenStates(layers=auto_race),
                "HiddenStates: auto_race trains copies of the student on the teacher, .* llm-dist",
            ),
            (
                "decided",
                HiddenStates(layers=partial(transport, refresh=5)),
                "HiddenStates: refresh looks at the teacher's layers while .* write refresh: 0",
            ),
            ("none", HiddenStates(), "HiddenStates: a cache .*hidden states .* states: true"),
            (
                "decided",
                HiddenStates(layers=partial(explicit, pairs=[[1, 3]])),
                "HiddenStates: a cache .*, and hidden states 3 are asked for",
            ),
            ("supervised", HiddenStates(layers=random), "hidden states 1, 3 are asked for"),
            ("valid", AttentionMaps(layers=uniform), "AttentionMaps: .*the attention of blocks"),
        ],
    )
    def test_refused(
        self, paths: dict[str, str], tmp_path: Path, kind: str, objective: Objective, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, Cached(paths[kind]), objective)

    def test_another_student(self, paths: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"for a student of 2 blocks, and .* has 3; run"):
            trainer(tmp_path, Cached(paths["decided"]), HiddenStates(), model=tiny.qwen3())

    def test_a_member_of_several(self, paths: dict[str, str], tmp_path: Path) -> None:
        team = Ensemble([tiny.llama("teacher"), Cached(paths["decided"])])
        with pytest.raises(InputError, match="auto looks at the teacher, and a cache among"):
            trainer(tmp_path, team, HiddenStates(member=1))
        with pytest.raises(InputError, match="a cache among several teachers decided no map"):
            hints.settled(team, [HiddenStates(), HiddenStates(member=1)], STUDENT)

    def test_other_members_may_be_looked_at(self, paths: dict[str, str], tmp_path: Path) -> None:
        team = Ensemble([tiny.llama("teacher"), Cached(paths["decided"])])
        made = trainer(tmp_path, team, HiddenStates(member=0))
        mapping = made.run.terms["HiddenStates"].mapping
        assert mapping is not None
        assert mapping.origin == "auto: coverage"

    def test_there_and_back(self) -> None:
        made = learned(2, 4)
        assert hints.read_map(json.loads(json.dumps(asdict(made)))) == made
        decided = hints.decisions(
            [HiddenStates(), Logits(), HiddenStates(layers=uniform)],
            [HiddenStates(layers=made), Logits(), HiddenStates(layers=uniform)],
        )
        assert list(decided) == ["HiddenStates"]
        assert decided["HiddenStates"]["strategy"] == "auto"
        again = hints.with_map("HiddenStates", HiddenStates(), decided, STUDENT, "it")
        assert again.layers == made


class TestRows:
    @pytest.mark.parametrize(
        ("objective", "rows"),
        [
            (HiddenStates(layers=PAIRS), "supervised"),
            (HiddenStates(layers=PAIRS, rows="valid"), "valid"),
            (HiddenStates(layers=PAIRS, blockwise=0.5), "valid"),
            (Contrastive(rows="valid"), "valid"),
            (HiddenStates(loss=rkd_distance, layers=PAIRS, items="pooled"), "supervised"),
        ],
    )
    def test_of_which_tokens(self, objective: Objective, rows: str) -> None:
        assert hints.rows_of(terms(objective, Logits(), CrossEntropy())) == rows

    def test_fewer_than_are_asked_for(self, paths: dict[str, str], tmp_path: Path) -> None:
        message = (
            r"HiddenStates: the cache .* holds hidden states 2, 4 of supervised tokens, 64 numbers "
            r"in 8 bit, and all valid tokens are asked for; write rows: supervised"
        )
        hint = HiddenStates(layers=PAIRS, rows="valid")
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, Cached(paths["supervised"]), hint)
        team = Ensemble([tiny.llama("teacher"), Cached(paths["supervised"])])
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, team, HiddenStates(layers=PAIRS, rows="valid", member=1))

    def test_those_of_another_member(self, paths: dict[str, str]) -> None:
        """A hint of one member asks nothing of another one's cache."""
        both = Ensemble([Local(tiny.llama("teacher")), Cached(paths["supervised"])])
        for member, refused in ((0, False), (1, True)):
            hint = HiddenStates(layers=uniform, member=member, rows="valid")
            terms = bind([hint], STUDENT, both.spec, seed=0)
            if refused:
                with pytest.raises(InputError, match="and all valid tokens are asked for"):
                    hints.check_rows(both, terms)
            else:
                hints.check_rows(both, terms)

    def test_more_than_are_asked_for(self, paths: dict[str, str], tmp_path: Path) -> None:
        made = trainer(tmp_path, Cached(paths["valid"]), HiddenStates(layers=PAIRS))
        assert made.run.collator.valid
        assert hints.keeps_valid(Cached(paths["valid"]))
        assert not hints.keeps_valid(Cached(paths["supervised"]))
        assert not hints.keeps_valid(Local(tiny.llama("teacher")))


class TestAsked:
    def test_nobody_reads_them(self) -> None:
        with pytest.raises(InputError, match=r"no objective \(Logits\) reads hidden states"):
            hints.check_asked(Cached("x", states=True), [Logits()], terms(Logits()), TEACHER)
        hints.check_asked(Cached("x"), [Logits()], terms(Logits()), TEACHER)

    @pytest.mark.parametrize("width", [64, 100])
    def test_more_directions_than_there_are(self, width: int) -> None:
        hint = HiddenStates(layers=PAIRS)
        asked: tuple[Any, ...] = ([hint], terms(hint), TEACHER)
        with pytest.raises(InputError, match=f"is {width}, and the states of .* have 64 features"):
            hints.check_asked(Cached("x", states=True, states_width=width), *asked)
        hints.check_asked(Cached("x", states=True, states_width=63), *asked)

    def test_layers_of_all_objectives(self) -> None:
        objectives = (
            HiddenStates(layers=PAIRS),
            Contrastive(),
            Logits(),
            HiddenStates(layers=learned),
        )
        specs: tuple[ModelSpec, ModelSpec] = STUDENT, TEACHER
        found = hints.layers_of(objectives, terms(*objectives), specs)
        assert {2, 4} <= found <= {1, 2, 3, 4}


def test_who_reads_what() -> None:
    cached = Cached("x")
    assert hints.lookup_of(cached, Request()) is None
    assert hints.lookup_of(Local("a/b"), Request(logits=True)) is None
    found = hints.lookup_of(cached, Request(hidden=frozenset({4, 2})))
    assert found is not None
    assert (found.folder, found.logits, found.layers) == ("x", False, (2, 4))


def test_strategies_that_compare_both(tmp_path: Path) -> None:
    """The map of the student's likeness to the teacher, decided while both are here."""
    hint = HiddenStates(layers=similar)
    path = caches.written(tmp_path, hints=[hint])
    made = trainer(tmp_path / "a", Cached(path), hint)
    live = trainer(tmp_path / "b", Local(tiny.llama("teacher"), tokenizer=tiny.tokenizer()), hint)
    assert made.run.terms["HiddenStates"].mapping == live.run.terms["HiddenStates"].mapping
