"""What a race decides for a run."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from llm_distill import binding, surveying
from llm_distill.balance.base import settle
from llm_distill.errors import InputError
from llm_distill.layers import LayerEvidence
from llm_distill.race import keeping
from llm_distill.race.candidates import (
    can_start_alone,
    candidates,
    proposals,
    races,
    settings_of,
    with_arm,
)
from llm_distill.race.examples import check_size, total_steps
from llm_distill.race.halving import Arm, Result, Size, race, table
from llm_distill.race.heats import Heats, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from transformers import TrainingArguments

    from llm_distill.balance import BalanceRule
    from llm_distill.layers import RaceSettings
    from llm_distill.objectives import Objective
    from llm_distill.preparation import Run
    from llm_distill.teachers import Source


def check(run: Run, args: TrainingArguments, balance: BalanceRule | None = None) -> None:
    """Refuse a race that cannot be run, as far as that is known before weights load.

    Raises:
        InputError: For settings out of range or of two minds, a sharded student, optimizers that
            are made already, too few steps or examples, or a map that cannot be.
    """
    settings = settings_of(run.objectives)
    if settings is None:
        return
    refuse(run, args)
    check_size(run.kwargs.get("train_dataset"))
    arms, waiting = _arms(run, settings, LayerEvidence(blocks=run.student.blocks), args, balance)
    _budget(arms, waiting, settings, total_steps(run, args))


def decided(
    run: Run,
    student: nn.Module,
    source: Source,
    args: TrainingArguments,
    evidence: LayerEvidence,
    make: Callable[..., Any],
) -> tuple[tuple[Objective, ...], tuple[str, ...]]:
    """The objectives with the map that wins a race, and the race's table.

    Where no hint wins, the objectives that raced are gone.

    Args:
        run: Its objectives say who races.
        student: Is not changed: every training has a copy.
        source: The teacher, opened for logits and all hidden states.
        args: Of the run; a training of the race has the same, but for its length.
        evidence: What the maps that take part are decided by.
        make: `DistillTrainer`, a partial of it where there is a `balance`.

    Raises:
        InputError: As `check`, which knows less.
        FloatingPointError: If all of the longest trainings fail.
    """
    settings = settings_of(run.objectives)
    if settings is None:
        return run.objectives, ()
    settled = make.keywords if isinstance(make, partial) else {}
    arms, _ = _arms(run, settings, evidence, args, settled.get("balance"), seen=True)
    budget = _budget(arms, 0, settings, total_steps(run, args))
    recipe = (settings, budget, arms, sorted(settled.items()))
    key = keeping.key_of(run, student, args, recipe)
    place = Path(str(args.output_dir)) / keeping.FILE
    found = surveying.agreed(keeping.read(place, key), args.device)
    if found is None:
        found = _race(arms, settings, budget, Heats(run, student, source, args, make))
        if key is not None and args.should_save:
            keeping.write(place, key, *found)
    winner, results = found
    return with_arm(run.objectives, winner), tuple(table(results, winner))


def _race(
    arms: Sequence[Arm], settings: RaceSettings, budget: int, heats: Heats
) -> tuple[Arm, tuple[Result, ...]]:
    """All trainings, with a bar."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not heats.shows) as bar:
        task = bar.add_task("race between layer maps", total=budget)

        def measure(arm: Arm, length: int) -> float:
            kl = heats.measure(arm, length)
            bar.update(task, advance=length, description=f"race: {arm.describe()} {kl:.4f}")
            return kl

        return race(arms, settings.weights, budget, measure)


def _arms(
    run: Run,
    settings: RaceSettings,
    evidence: LayerEvidence,
    args: TrainingArguments,
    balance: BalanceRule | None,
    *,
    seen: bool = False,
) -> tuple[list[Arm], int]:
    """The candidates that are known, and how many may be added when the data were seen."""

    def fit(arm: Arm) -> None:
        objectives = with_arm(run.objectives, arm)
        terms = binding.bind(objectives, run.student, run.teacher.spec, seed=args.seed)
        settle(balance, terms, run.student.depth)

    depths = run.student.depth, run.teacher.spec.depth
    proposed = proposals(settings, depths, evidence, seen=seen)
    arms = candidates(
        proposed,
        settings,
        alone=all(races(objective) for objective in run.objectives),
        blockwise=can_start_alone(run.objectives),
        fit=fit,
    )
    return arms, sum(proposal.mapping is None for proposal in proposed)


def _budget(arms: Sequence[Arm], waiting: int, settings: RaceSettings, total: int) -> int:
    """Steps of all trainings together.

    Args:
        arms: That are known.
        waiting: Arms that may come on top.
        settings: Weights, and the share of the training.
        total: Steps of the training.

    Raises:
        InputError: If that is too few to say anything.
    """
    hints = sum(arm.mapping is not None for arm in arms) + waiting
    none = any(arm.mapping is None for arm in arms)
    size = Size(hints, len(settings.weights), none, settings.shortest)
    budget = math.floor(settings.share * total + 1e-6)
    if budget >= size.least:
        return budget
    share = math.ceil(100 * size.least / total) / 100
    instead = f"write share: {share:g}, " if share < 1 else ""
    raise InputError(
        f"auto_race: share {settings.share:g} of {total} steps are {budget}, and a race of {hints} "
        f"maps with {len(settings.weights)} weights takes at least {size.least}; {instead}"
        f"train {math.ceil(size.least / settings.share)} steps, write fewer weights, or auto"
    )
