# ruff: noqa: E501  tables of cases
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import llm_distill
from llm_distill import heads, layers, losses, projectors, schedules
from llm_distill.cache.estimator import Estimator
from llm_distill.errors import InputError
from llm_distill.objectives import Objective
from llm_distill.recipe import components
from llm_distill.recipe.components import Components
from llm_distill.recipe.values import Place

FOREIGN = """
import os
from dataclasses import dataclass
from subprocess import Popen, run

from llm_distill import Logits
from llm_distill.objectives import row_wise, Objective

LIMIT = 3


def huber(student, teacher, *, delta: float = 1.0):
    return (student - teacher).abs().mean(-1) * delta


def plain(student, teacher, power=2):
    return (student - teacher).pow(power).mean(-1)


@dataclass(frozen=True, kw_only=True)
class Entropies(Objective):
    scale: float

    def build(self, student, teacher, evidence=None):
        return row_wise(lambda s, t: (s - t).square().mean(-1) * self.scale)


class Danger:
    def __init__(self, command):
        os.system(command)
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package `strange` with a module `losses`, importable and not imported yet."""
    package = tmp_path / "strange"
    package.mkdir()
    (package / "__init__.py").write_text("from strange.losses import huber\n")
    (package / "losses.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "strange.losses"
    for name in ("strange", "strange.losses"):
        sys.modules.pop(name, None)


def objective(value: Any, *allowed: str) -> Any:
    return Components(allowed)(value, Objective, Place("objectives").entry(1))


class TestNames:
    def test_a_name(self) -> None:
        assert objective("Logits") == llm_distill.Logits()

    def test_a_name_with_nothing_below_it(self) -> None:
        assert objective({"Logits": None}) == llm_distill.Logits()

    def test_arguments(self) -> None:
        made = objective({"Logits": {"temperature": "2e0", "weight": 3, "loss": "reverse_kl"}})
        assert made == llm_distill.Logits(temperature=2.0, weight=3.0, loss=losses.reverse_kl)

    def test_functions_get_their_settings(self) -> None:
        loss = objective({"Logits": {"loss": {"jsd": {"beta": 0.1}}}}).loss
        assert isinstance(loss, partial)
        assert (loss.func, loss.args, loss.keywords) == (losses.jsd, (), {"beta": 0.1})

    def test_the_module_of_the_field_comes_first(self) -> None:
        made = objective(
            {
                "HiddenStates": {
                    "loss": "cosine",
                    "weight": {"cosine": {"start": 1, "end": "1e-1"}},
                    "projector": "linear",
                    "layers": {"explicit": {"pairs": [[1, 2], [-1, -1]]}},
                }
            }
        )
        assert made.loss is losses.cosine
        assert made.weight.func is schedules.cosine
        assert made.weight.keywords == {"start": 1.0, "end": 0.1}
        assert made.projector is projectors.linear
        assert made.layers.func is layers.explicit
        assert objective({"AttentionMaps": {"heads": "match"}}).heads is heads.match

    def test_lists_of_names_are_the_public_ones(self) -> None:
        for name in ("heads", "layers", "projectors", "schedules", "losses"):
            assert sys.modules[f"llm_distill.{name}"].__all__

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("Logit", r"^objectives\[1\]: no 'Logit' in llm_distill; did you mean 'Logits'\?"),
            ("zzz", "no 'zzz' in llm_distill; it has .*AttentionMaps, .*Contrastive, CrossEntropy"),
            ("forward_kl", "'forward_kl' is no Objective; write one of AttentionMaps, Contrastive, CrossEntropy"),
            ("Local", "'Local' is no Objective"),
            ("DistillTrainer", "'DistillTrainer' is no Objective"),
            ({"Logits": {"temprature": 2}}, r"objectives\[1\]\.Logits: Logits has no 'temprature'; did you mean 'temperature'"),
            ({"Logits": {"zzz": 2}}, "has no 'zzz'; it has weight, name, loss"),
            ({"Logits": {"loss": "forward"}}, r"\[1\]\.Logits\.loss: no 'forward' in llm_distill.losses; did you mean 'forward_kl'"),
            ({"Logits": {"loss": "Logits"}}, "no 'Logits' in llm_distill.losses"),
            ({"Logits": {"loss": "uniform"}}, "no 'uniform' in llm_distill.losses"),
            ({"HiddenStates": {"layers": "LayerMap"}}, "no 'LayerMap' in llm_distill.layers; it has arc_length, auto"),
            ({"HiddenStates": {"layers": "mse"}}, "no 'mse' in llm_distill.layers"),
            ({"Logits": {"loss": {"jsd": {"gamma": 1}}}}, r"Logits\.loss\.jsd: jsd has no 'gamma'; it has beta"),
            ({"Logits": {"loss": {"jsd": {"student": 1}}}}, "jsd has no 'student'"),
            ({"Logits": {"loss": {"forward_kl": {"a": 1}}}}, "forward_kl has no 'a'; it takes no arguments"),
            ({"Logits": {"loss": {"jsd": {"beta": "x"}}}}, r"loss\.jsd\.beta: 'x' is not .* a number"),
            ({"Logits": {"loss": {"jsd": {"beta": 2}}}}, r"^objectives\[1\]: .*beta=2.0 is outside"),
            ({"Logits": {"weight": "linear"}}, r"weight\.linear needs start, end: linear: \{start: …, end: …\}"),
            ({"HiddenStates": {"layers": "explicit"}}, "explicit needs pairs"),
            ({"HiddenStates": {"layers": {"explicit": {"pairs": [["a", 1]]}}}}, r"pairs\[0\]\[0\]: 'a'"),
            ({"HiddenStates": {"layers": {"last": {"n": 1.5}}}}, r"layers\.last\.n: 1.5 is not"),
            ({"AttentionMaps": {"heads": {"match": {"assignment": [1]}}}}, "Tensor cannot be written in a recipe; leave it out"),
            ({"Logits": {"temperature": 0}}, r"^objectives\[1\]: Logits: temperature is 0.0; it must be"),
            ({"Logits": {"weight": -1}}, "weight is -1.0 at progress 0.0; it must be finite and >= 0"),
            ({"Logits": {"weight": float("nan")}}, r"Logits\.weight: nan is not finite"),
            ({"Logits": {"scaling": "T3"}}, r"Logits\.scaling: 'T3' is not .* did you mean"),
            ({"Logits": 2}, r"\[1\]\.Logits: 2 has no names; write Logits: \{argument: value\}"),
            ({"Logits": {}, "weight": 1}, "Logits, weight stand side by side; .* indented"),
            ({}, "is no component"),
            (3, "3 is no component; write a name"),
            ([1], "is no component"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_meant(self, value: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            objective(value)


class TestForeignCode:
    def test_it_is_refused_before_it_is_imported(self, foreign: str) -> None:
        with pytest.raises(InputError, match=r"outside llm_distill.*--allow-code strange\.losses"):
            objective({"Logits": {"loss": f"{foreign}:huber"}})
        assert "strange" not in sys.modules

    @pytest.mark.parametrize(
        "allowed", ["strange.other", "strang", "strange.losses.more", "losses", ""]
    )
    def test_other_permissions_do_not_count(self, foreign: str, allowed: str) -> None:
        with pytest.raises(InputError, match="--allow-code"):
            objective({"Logits": {"loss": f"{foreign}:huber"}}, allowed)
        assert "strange" not in sys.modules

    @pytest.mark.parametrize("allowed", ["strange", "strange.losses"])
    def test_a_function(self, foreign: str, allowed: str) -> None:
        made = objective({"Logits": {"loss": {f"{foreign}:huber": {"delta": "1e-1"}}}}, allowed)
        assert made.loss.keywords == {"delta": 0.1}
        assert made.loss.func.__name__ == "huber"

    def test_an_argument_with_a_default_is_a_setting(self, foreign: str) -> None:
        made = objective({"Logits": {"loss": {f"{foreign}:plain": {"power": 4}}}}, "strange")
        assert made.loss.keywords == {"power": 4}
        with pytest.raises(InputError, match="plain has no 'student'; it has power"):
            objective({"Logits": {"loss": {f"{foreign}:plain": {"student": 4}}}}, "strange")

    def test_an_objective(self, foreign: str) -> None:
        made = objective({f"{foreign}:Entropies": {"scale": 2, "weight": 0.5}}, "strange")
        assert (type(made).__name__, made.scale, made.weight) == ("Entropies", 2.0, 0.5)
        with pytest.raises(InputError, match="Entropies: scale is missing"):
            objective(f"{foreign}:Entropies", "strange")

    def test_a_function_that_an_allowed_package_passes_on(self, foreign: str) -> None:
        assert objective({"Logits": {"loss": "strange:huber"}}, "strange").loss.__name__ == "huber"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("strange.losses:Popen", "comes from subprocess, which is not allowed"),
            ("strange.losses:run", "comes from subprocess, which is not allowed"),
            ("strange.losses:Danger", "'strange.losses:Danger' is no Objective"),
            ("strange.losses:os", "neither a function nor a class"),
            ("strange.losses:LIMIT", "neither a function nor a class"),
            ("strange.losses:hubr", "no 'hubr' in strange.losses; did you mean 'huber'"),
            ("strange.nothing:x", "'strange.nothing' cannot be imported"),
            ("strange.losses:huber.x", "is no name"),
            ("strange losses:huber", "is no name"),
            ("subprocess:Popen", "--allow-code subprocess"),
            ("os:system", "--allow-code os"),
        ],
    )
    def test_what_is_allowed_opens_nothing_else(
        self, foreign: str, name: str, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            objective({name: {}}, "strange")

    def test_a_class_is_no_loss(self, foreign: str) -> None:
        with pytest.raises(InputError, match="is no function; write one of adaptive_kl, alpha_be"):
            objective({"Logits": {"loss": f"{foreign}:Entropies"}}, "strange")

    def test_processes_cannot_be_started_even_if_allowed(self) -> None:
        with pytest.raises(InputError, match="is no Objective"):
            objective({"subprocess:Popen": {"args": ["true"]}}, "subprocess")


def test_fields_of_types_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Objective):
        other: "Missing" = None  # type: ignore[name-defined]  # noqa: F821  not there

        def build(self, student: Any, teacher: Any, evidence: Any = None) -> Any:
            raise NotImplementedError

    made = Components().spec(Odd, {"other": 3}, Place("x"), Place("x.Odd"))
    assert made.other == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"saved": "map.yaml"}, r"'map\.yaml' has no name; write saved: \{path: map\.yaml\}"),
        ({"last": 2}, r"2 has no name; write last: \{n: 2\}"),
        ([[2, 9]], r"\[\[2, 9\]\] is no component; write \{explicit: \{pairs: …\}\}"),
    ],
)
def test_arguments_without_their_names(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Components()(value, Callable[..., Any], Place("HiddenStates").key("layers"))


def test_type_hints_of_all_names_are_known() -> None:
    """Where one is not, nothing of the component is checked."""
    homes = sorted({*components.FIELDS.values(), "llm_distill"})
    there = [(home, vars(import_module(home))) for home in homes]
    made = [
        getattr(import_module(home), name) for home, module in there for name in module["__all__"]
    ]
    kinds = [kind for kind in made if inspect.isfunction(kind) or components.is_spec(kind)]
    assert len(kinds) > 60
    for kind in kinds:
        get_type_hints(kind)


@pytest.mark.parametrize("k", ["eight", 1.5, None, True])
def test_numbers_of_what_is_kept(k: Any) -> None:
    make = Components()
    place = Place("teacher.Cached.keep", "keep")
    with pytest.raises(InputError, match=r"keep.topk.k: .*write an integer"):
        make({"topk": {"k": k}}, Callable[[], Estimator], place)
    made = make({"topk": {"k": "8"}}, Callable[[], Estimator], place)
    assert made().k == 8
