"""The recipes of all kinds are recipes, of which a plan can be made."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from llm_distill.cli.plan import plan
from llm_distill.quantising import Quantize
from llm_distill.recipe import Recipe
from scripts.bench.kinds.command import ROOT
from scripts.bench.kinds.recipes import BATCH, QUANTISED, Kind, kinds

ROUTED = {"path": "here/train.jsonl", "eval": "here/eval.jsonl"}
KINDS = kinds(Path("there"), Path("caches"), ROUTED)


def base(folder: Path) -> dict[str, object]:
    content = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    return {**content, "data": {"path": str(folder / "train.txt"), "max_length": 32}}


def test_every_kind_is_among_them() -> None:
    told = str([kind.teacher for kind in KINDS])
    names = "Cached Remote Ensemble Routed BornAgain Ema AdapterOff DeepToShallow"
    assert all(name in told for name in names.split())
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert set(QUANTISED) == set(get_args(Quantize)) - {"torchao_int4", "torchao_float8"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_can_be_planned(kind: Kind, quickstart: Path) -> None:
    by_name = {kind.name: kind for kind in kinds(quickstart, quickstart / "caches", ROUTED)}
    content = by_name[kind.name].recipe(base(quickstart), quickstart / "out", 3, "http://there")
    assert content["training"]["max_steps"] == 3
    assert content["training"][BATCH] * kind.processes == 8
    assert content["data"]["limit"] == 24
    if kind.cached or kind.remote:  # which ask for what is not there yet
        assert type(Recipe.of(content).teacher).__name__ == next(iter(content["teacher"]))
        return
    if "Routed" in kind.name:
        content["data"] |= {"path": str(quickstart / "train.txt"), "eval": None}
    made = plan(Recipe.of(content), Recipe.of(content).arguments(), here=False)
    assert made.student.depth == 2
