"""Another look at the student while it trains: layer maps that follow it, where they ask to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from llm_distill import surveying
from llm_distill.arguments import sharded_by
from llm_distill.errors import InputError
from llm_distill.layers import asks, auto_race, decide, looks, refreshed
from llm_distill.objectives import Mapped, named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from llm_distill.layers import LayerMap, LayerStrategy
    from llm_distill.objectives import Objective
    from llm_distill.preparation import Run
    from llm_distill.teachers import Source

FROZEN = 0.3
"""Share of the training after which maps stay: what one layer taught is lost for the next."""


def check(run: Run, args: TrainingArguments) -> None:
    """Refuse looks that could not be taken, before weights load.

    Raises:
        InputError: For a sharded student, or a race in the same run.
    """
    raced = [o for o in run.objectives if isinstance(o, Mapped) and _plain(o.layers) is auto_race]
    also = [s for o in raced for s in getattr(o.layers, "keywords", {}).get("also", ())]
    if not follows(run.objectives) and not any(map(looks, also)):
        return
    for name, objective in _following(run.objectives).items():
        if "cross" not in asks(objective.layers):
            raise InputError(
                f"{name}: refresh looks at the student, and this strategy is told what it is like: "
                "leave `cross` out, or refresh"
            )
    if raced:
        raise InputError(
            "refresh: auto_race decides once, by trainings on maps that stay, and may let an "
            "objective go; leave refresh out, or the race"
        )
    sharded = sharded_by(args)
    if sharded is not None:
        raise InputError(
            f"refresh reads the whole student between two steps, which {sharded} keeps in "
            "pieces; leave refresh out, or train with one process or DDP"
        )


class Refresh(TrainerCallback):
    """Decides maps anew while the student trains, between warm-up and `FROZEN`.

    Args:
        asked: The run as its strategies were written, before data decided them.
        run: The run that trains; its terms are those of `asked`.
        student: What is looked at.
        source: The teacher.
        tell: Shows lines.
    """

    def __init__(
        self,
        asked: Run,
        run: Run,
        student: nn.Module,
        source: Source,
        tell: Callable[..., None],
    ) -> None:
        self._following = _following(asked.objectives)
        self._asked = replace(asked, objectives=tuple(self._following.values()))
        self._run, self._student, self._source, self._tell = run, student, source, tell
        for name in self._following:
            run.terms[name].moves = True
        self._shown = {name: run.terms[name].mapping for name in self._following}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint may have brought maps of its own; some looks never come."""
        self.on_train_end(args, state, control, **kwargs)
        first, last = args.get_warmup_steps(state.max_steps) + 1, int(FROZEN * state.max_steps)
        for name, objective in self._following.items():
            steps = looks(objective.layers)
            if not any(step % steps == 0 for step in range(first, last + 1)):
                self._tell(
                    f"{name}: refresh {steps} never looks: between warm-up and {FROZEN:.0%} of "
                    f"{state.max_steps} steps there is no such step"
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """So may the best one."""
        del args, state, control, kwargs
        self._source.ask(self._run.teacher_request)
        for name, shown in self._shown.items():
            mapping = self._run.terms[name].mapping
            if mapping != shown:
                self._tell(f"{name}: the map of the checkpoint", str(mapping))
            self._shown[name] = mapping

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As Trainer calls it."""
        del control, kwargs
        step = state.global_step
        if args.get_warmup_steps(state.max_steps) < step <= FROZEN * state.max_steps:
            due = [name for name, o in self._following.items() if step % looks(o.layers) == 0]
            if due:
                self._look(due, args, step)

    def _look(self, due: Sequence[str], args: TrainingArguments, step: int) -> None:
        """Compare the layers as they are now, and move what gains by it."""
        evidence = surveying.survey(self._asked, self._student, self._source, args, kept=False)
        for name in due:
            term, cross = self._run.terms[name], evidence.cross
            if cross is None or term.mapping is None:
                continue
            current = term.mapping
            depths = current.student_depth, current.teacher_depth
            proposed = decide(self._following[name].layers, *depths, evidence)
            found, why = refreshed(current, proposed, cross)
            if found is not current:
                term.move(found)
                self._shown[name] = found
                self._tell(f"step {step}: {name} moves its map", str(found))
            elif why is not None:
                self._tell(f"step {step}: {name} keeps its map; of {_pairs(proposed)}: {why}")
        self._source.ask(self._run.teacher_request)


def follows(objectives: Sequence[Objective]) -> bool:
    """Whether any map follows the student."""
    return bool(_following(objectives))


def _following(objectives: Sequence[Objective]) -> Mapping[str, Mapped]:
    """The objectives whose maps follow the student, under their names in the log."""
    return {
        name: objective
        for name, objective in named(objectives).items()
        if isinstance(objective, Mapped) and looks(objective.layers)
    }


def _plain(strategy: LayerStrategy) -> LayerStrategy:
    """Without its settings."""
    return strategy.func if isinstance(strategy, partial) else strategy


def _pairs(mapping: LayerMap) -> str:
    """The pairs in one line."""
    return " ".join(f"{row.student}->{'+'.join(map(str, row.layers))}" for row in mapping.rows)
