"""`llm-distill map`: which layer would learn from which, before anything is trained."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from llm_distill import plots, schedules
from llm_distill.cli.console import Screen
from llm_distill.cli.deciding import Decided, mapped, of_configs, of_data
from llm_distill.cli.plan import plan
from llm_distill.cli.reading import open_screen
from llm_distill.errors import InputError
from llm_distill.layers import LayerMap, asks
from llm_distill.objectives import HiddenStates, Mapped
from llm_distill.recipe import Recipe
from llm_distill.teachers import Cached


def map_layers(
    recipe: Recipe, *, folder: str | None = None, overwrite: bool = False, reads: bool = True
) -> dict[str, LayerMap]:
    """Decide, show, draw and write the layer maps of a recipe; nothing is trained.

    Args:
        recipe: As for `run`.
        folder: Where maps and pictures go; by default the recipe's output folder.
        overwrite: Whether a map that is there, and is another one, may be lost.
        reads: Whether weights and data are read: to decide maps, and to draw them.

    Returns:
        The maps by the names of their objectives; one that lost a race has none.

    Raises:
        InputError: If no objective has a map, for what `run` would refuse, or if a map that may
            have been edited would be lost.
    """
    mapped(recipe.objectives)
    args = recipe.arguments(**({} if folder is None else {"output_dir": folder}))
    screen = open_screen(args)
    # A cache holds the states of one map, which was decided when it was written.
    reads = reads and not isinstance(recipe.teacher, Cached)
    planned = plan(recipe, args, here=reads)
    decided = of_data(recipe, args, planned, screen) if reads else of_configs(planned)
    maps = {name: o.mapping(planned.student, planned.teacher) for name, o in decided.after.items()}
    for line in decided.told:
        screen.say(line)
    for name, layer_map in maps.items():
        screen.layer_map(name, layer_map, decided.evidence)
    paths = _paths(decided, Path(str(args.output_dir)).expanduser())
    if args.process_index == 0:
        _write(maps, paths, decided, overwrite=overwrite)
    _tell(recipe, decided, paths, screen)
    _part(args)
    return maps


def _paths(decided: Decided, folder: Path) -> dict[str, Path]:
    """The YAML of each objective.

    Raises:
        InputError: If two objectives' names differ only in what no file name has.
    """
    if len(decided.before) == 1:
        return dict.fromkeys(decided.before, folder / "map.yaml")
    paths = {
        name: folder / f"map-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.yaml"
        for name in decided.before
    }
    if len(set(paths.values())) < len(paths):
        raise InputError(
            f"objectives: the names {', '.join(paths)} give the same files; write others"
        )
    return paths


def _write(
    maps: Mapping[str, LayerMap], paths: Mapping[str, Path], decided: Decided, *, overwrite: bool
) -> None:
    """Write the maps, which people may have edited since the last time, and draw them."""
    for name, layer_map in maps.items():
        if paths[name].exists() and not overwrite and not _holds(paths[name], layer_map):
            raise InputError(
                f"{paths[name]} holds another map, which may have been edited; write --overwrite "
                "to replace it, or another folder: -o FOLDER"
            )
    for name, layer_map in maps.items():
        if not _holds(paths[name], layer_map):  # else comments in it stay
            layer_map.save(paths[name])
        if decided.evidence.similarity is not None:
            drawn = plots.heat_map(
                layer_map, decided.evidence.similarity, decided.evidence.cross, title=name
            )
            plots.save(drawn, paths[name].with_suffix(".png"))


def _holds(path: Path, layer_map: LayerMap) -> bool:
    """Whether a file holds this very map; where it says to come from does not matter."""
    if not path.exists():
        return False
    try:
        there = LayerMap.load(path)
    except InputError:
        return False
    return replace(there, origin=layer_map.origin, evidence=layer_map.evidence) == layer_map


def _tell(recipe: Recipe, decided: Decided, paths: Mapping[str, Path], screen: Screen) -> None:
    """What was written where, and what to put into the recipe."""
    drawn = decided.evidence.similarity is not None
    for name, before in mapped(recipe.objectives).items():
        if name not in decided.after:
            screen.say(f"{name}: no map was better than no hint; leave it out of the recipe")
            continue
        path = paths[name]
        screen.say(f"{name}: {path}" + (f", {path.with_suffix('.png')}" if drawn else ""))
        if "epoch" in asks(before.layers):
            screen.say("It is drawn anew in each epoch; in the recipe this map would stay.")
        settings = _settings(before, decided.before[name], decided.after[name], path)
        screen.say(f"In the recipe: {_flow(settings)}")
        factor = _factor(decided.before[name], decided.after[name])
        if callable(before.weight) and factor != 1:
            screen.say(f"The map won with {factor:g} times its weight.")
    if not drawn:
        screen.say("There is no heat map: layers were not compared (--no-data, or too few data).")


def _settings(written: Mapped, before: Mapped, after: Mapped, path: Path) -> dict[str, Any]:
    """What an objective has in a recipe to be as it was decided."""
    settings: dict[str, Any] = {"layers": {"saved": {"path": str(path)}}}
    factor = _factor(before, after)
    if factor != 1 and not callable(written.weight):
        settings["weight"] = round(written.weight * factor, 6)
    if _blockwise(after) != _blockwise(before):
        settings["blockwise"] = round(_blockwise(after), 3)
    return settings


def _blockwise(objective: Mapped) -> float:
    """Share of the training in which blocks learn alone."""
    return objective.blockwise if isinstance(objective, HiddenStates) else 0.0


def _factor(before: Mapped, after: Mapped) -> float:
    """What a race multiplied the weight with."""
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        old = schedules.at(before.weight, progress)
        if old > 0:
            return round(schedules.at(after.weight, progress) / old, 6)
    return 1.0


def _flow(settings: Mapping[str, Any]) -> str:
    """Settings on one line, as they stand in a recipe.

    >>> _flow({"layers": {"saved": {"path": "out/x/map.yaml"}}, "weight": 3.0})
    'layers: {saved: {path: out/x/map.yaml}}, weight: 3.0'
    """
    text = yaml.safe_dump(
        dict(settings), default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20
    )
    return text.strip()[1:-1]


def _part(args: TrainingArguments) -> None:
    """Several processes go together."""
    args.distributed_state.wait_for_everyone()
    args.distributed_state.destroy_process_group()
