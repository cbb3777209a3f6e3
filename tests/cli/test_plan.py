from pathlib import Path
from typing import Any

import pytest

from llm_distill.cli.plan import plan
from llm_distill.errors import InputError
from llm_distill.recipe import Recipe


def planned(content: dict[str, Any], *, here: bool = True) -> Any:
    recipe = Recipe.of(content)
    return plan(recipe, recipe.arguments(), here=here)


def test_what_a_recipe_comes_to(content: dict[str, Any], models: Path) -> None:
    made = planned(content)
    assert (made.student.depth, made.teacher.depth) == (2, 4)
    assert list(made.terms) == ["CrossEntropy", "Logits"]
    assert [type(o).__name__ for o in made.objectives] == list(made.terms)
    assert made.tokenizer.name_or_path == str(models / "student")
    assert made.positions == 64
    assert made.causal


def test_a_student_with_random_weights_has_the_teachers_tokenizer(
    content: dict[str, Any], models: Path
) -> None:
    content["student"] = {
        "FromConfig": {"architecture": "gpt2", "config": {"n_layer": 1, "n_positions": 40}}
    }
    made = planned(content)
    assert (made.student.kind, made.student.depth, made.student.vocabulary) == ("gpt2", 1, 300)
    assert made.tokenizer.name_or_path == str(models / "teacher")
    assert made.positions == 40


def test_an_evaluation_needs_data(content: dict[str, Any]) -> None:
    del content["data"]["eval"]
    content["training"]["eval_strategy"] = "epoch"
    with pytest.raises(InputError, match=r"eval_strategy is epoch, .* write data: \{eval: 0.05\}"):
        planned(content)


def test_a_stream_needs_a_number_of_steps(content: dict[str, Any]) -> None:
    content["data"] = {"path": content["data"]["path"], "streaming": True}
    content["training"]["max_steps"] = -1
    with pytest.raises(InputError, match="a stream has no known length"):
        planned(content)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "auto_race has share 2.0; write a fraction of the steps"),
        ([{"AttentionMaps": {"layers": "auto_race"}}], "share 2.0"),
        ([{"AttentionMaps": {"layers": {"auto_race": {"share": 0.1}}}}], "different settings"),
    ],
)
def test_a_race_needs_settings_that_can_be(
    content: dict[str, Any], others: list[Any], message: str
) -> None:
    share = 0.2 if "different" in message else 2
    raced = {"HiddenStates": {"layers": {"auto_race": {"share": share}}}}
    with pytest.raises(InputError, match=message):
        planned(content | {"objectives": ["Logits", raced, *others]})


@pytest.mark.parametrize("shard", ["fsdp2", "auto", "zero3"])
def test_members_in_pieces_are_planned_anywhere(
    content: dict[str, Any], models: Path, shard: str
) -> None:
    """A recipe for many processes is checked on one."""
    member = {"Local": {"model": str(models / "teacher"), "shard": shard}}
    content["teacher"] = {"Ensemble": {"members": [member, str(models / "teacher")]}}
    assert planned(content, here=False).teacher.members[0].depth == 4


def test_what_members_cannot_give_is_refused(content: dict[str, Any], models: Path) -> None:
    experts = {name: str(models / "teacher") for name in ("one", "two")}
    content["teacher"] = {"Routed": {"experts": experts, "by": "kind"}}
    content["data"]["keep"] = ["kind"]
    content["objectives"].append("AttentionMaps")
    with pytest.raises(InputError, match=r"attention of blocks .* is asked for; use Logits and"):
        planned(content)


def test_quantised_members_are_planned_anywhere(content: dict[str, Any], models: Path) -> None:
    """What a machine has to have for it is asked where it trains."""
    small = {"Local": {"model": str(models / "teacher"), "quantize": "torchao_float8"}}
    content["teacher"] = {"Ensemble": {"members": [small, str(models / "teacher")]}}
    assert planned(content, here=False).teacher.depth == 4
    with pytest.raises(
        InputError, match=r"needs an NVIDIA GPU .* trains on cpu; write torchao_int8"
    ):
        planned(content)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantize": "torchao_int4"}, "needs an NVIDIA GPU of compute capability 8.0"),
        ({"shard": "fsdp2"}, "spreads it over processes and there is one"),
    ],
)
def test_what_this_launch_cannot_do_is_refused_where_it_trains(
    content: dict[str, Any], models: Path, asked: dict[str, str], message: str
) -> None:
    content["teacher"] = {"Local": {"model": str(models / "teacher"), **asked}}
    assert planned(content, here=False).teacher.depth == 4
    with pytest.raises(InputError, match=message):
        planned(content)


def test_what_no_machine_could_do_is_refused_beside_them(
    content: dict[str, Any], models: Path
) -> None:
    path = str(models / "teacher")
    small = {"Local": {"model": path, "quantize": "torchao_float8"}}
    content["teacher"] = {"Ensemble": {"members": [path, small], "turns": True}}
    with pytest.raises(InputError, match="teacher is quantised, and such weights stay on the dev"):
        planned(content)


def test_an_unknown_way_to_quantise(content: dict[str, Any], models: Path) -> None:
    content["teacher"] = {"Local": {"model": str(models / "teacher"), "quantize": "torchao_int9"}}
    with pytest.raises(InputError, match=r"quantize.*torchao_int9.*torchao_int8"):
        planned(content)
