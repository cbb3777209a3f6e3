"""The tables of one pair, from its lines."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from scripts.bench.mapping.plan import SIDE
from scripts.bench.mapping.settings import BLOCKS
from scripts.bench.mapping.statistics import Difference, difference, interval, spearman

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scripts.bench.mapping.jobs import Job, Line, Rows
    from scripts.bench.mapping.plan import Plan

MEASURED = ("auto", "auto_race")
"""What the goal is asked of."""

SCORES = ("coverage", "segmentation")
"""What strategies maximise, from the teacher alone; the first is that of `auto`."""


class Results:
    """The lines of one pair, read as tables.

    Args:
        plan: Of the pair.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.best = plan.best_hand()

    def job(self, arm: str, seed: int) -> Job | None:
        """Of an arm or of a study."""
        if arm in SIDE:
            return self.plan.study(arm, seed)
        return self.plan.job(arm, seed)

    def arms(self) -> list[str]:
        """Those with a finished training, in the order of the table."""
        beside = ("auto as shipped", "auto_race", *SIDE)
        return [arm for arm in ("none", *self.plan.maps(), *beside) if self.lines(arm)]

    def lines(self, arm: str) -> dict[int, Line]:
        """Finished trainings by seed."""
        found = {seed: self.plan.line(self.job(arm, seed)) for seed in self.plan.seeds(arm)}
        return {seed: line for seed, line in found.items() if line is not None}

    def versus(self, arm: str, other: str | None) -> Difference | None:
        """Paired difference over the seeds that both have; None where there are none."""
        if other is None:
            return None
        ours, theirs = self.lines(arm), self.lines(other)
        both = [s for s in ours if s in theirs and ours[s]["documents"] and theirs[s]["documents"]]
        if not both:
            return None
        return difference(
            [ours[s]["documents"] for s in both], [theirs[s]["documents"] for s in both]
        )

    def mean(self, arm: str) -> tuple[float, float, float]:
        """KL over the seeds, and its interval; infinite where a training failed."""
        lines = self.lines(arm).values()
        if not lines or any(line["kl"] is None for line in lines):
            return math.inf, math.inf, math.inf
        values = [line["kl"] for line in lines]
        return (sum(values) / len(values), *interval([[value] for value in values]))

    # Tables

    def table(self) -> list[str]:
        """Arms."""
        best = self.best or "not known"
        head = ["arm", "map (seed 0)", "weight", "seeds", "held-out KL", f"% vs {best}", "CPU s"]
        return markdown(head, [self._row(arm) for arm in self.arms()])

    def _row(self, arm: str) -> list[str]:
        lines = self.lines(arm)
        mean, low, high = self.mean(arm)
        job = self.job(arm, min(lines))
        weight = "raced" if arm == "auto_race" else f"{job.weight:g}" if job else ""
        found = None if arm == self.best else self.versus(arm, self.best)
        seconds = sum(line["cpu"] for line in lines.values()) / len(lines)
        return [
            f"**{arm}**" if arm in (*MEASURED, self.best) else arm,
            shown(job.mapping if job else None),
            "" if arm == "none" else weight,
            str(len(lines)),
            f"{mean:.4f} [{low:.4f}, {high:.4f}]",
            "" if found is None else str(found),
            f"{seconds:.1f}",
        ]

    def weights(self) -> list[str]:
        """Mean KL over the tuning seeds, by map and weight."""
        plan = self.plan
        tried = {arm: plan.weights_of(arm) for arm in plan.maps()}
        columns = sorted({weight for weights in tried.values() for weight in weights})
        rows = []
        for arm, weights in tried.items():
            cells = []
            for weight in columns:
                mean = plan.mean(arm, weight) if weight in weights else None
                mark = "**" if weight == plan.best_weight(arm) else ""
                cells.append("" if mean is None else f"{mark}{mean:.4f}{mark}")
            rows.append([arm, *cells])
        return markdown(["map", *(f"weight {w:g}" for w in columns)], rows)

    def race(self) -> list[str]:
        """What won the races, and what they took."""
        lines = [line for line in self.lines("auto_race").values() if "winner" in line]
        if not lines:
            return []
        won = Counter(named(line["winner"]) for line in lines)
        rows = [[name, f"{count} of {len(lines)}"] for name, count in won.most_common()]
        steps = sum(line["race_steps"] for line in lines) / len(lines)
        before = sum(line["before"] for line in lines) / len(lines)
        whole = sum(line["cpu"] for line in lines) / len(lines)
        usual = self.plan.settings.steps_of(self.plan.pair)
        told = f"Race: {steps:.0f} steps beside {usual}, {before:.1f} CPU seconds "
        told += f"of {whole:.1f} with calibration."
        found = self.versus("auto_race", "best hand at race cost")
        if found is not None:
            told += f" Against the best map by hand with the race's steps added: {found} %"
            told += f" over {found.seeds} seeds."
        return [*markdown(["winner", "races"], rows), "", told]

    def beside(self) -> list[str]:
        """Blocks that learn alone, and the defaults, each against its like without."""
        rows = []
        for arm, other in (
            ("blockwise", self.plan.best_map()),
            ("auto as shipped", "auto"),
            ("auto as shipped", "best hand as shipped"),
            ("auto", "none"),
            ("auto_race", "none"),
            ("auto_race", "auto"),
        ):
            found = self.versus(arm, other)
            if found is not None:
                rows.append([arm, str(other), str(found), str(found.seeds)])
        return markdown(["arm", "against", "difference in %", "seeds"], rows) if rows else []

    def blocks(self) -> list[str]:
        """Choice of blocks x hint, mean KL."""
        jobs = self.plan.blocks()
        rows = []
        for choice in BLOCKS:
            cells = []
            for arm in ("none", "auto"):
                found = [
                    self.plan.kl(j) for (c, a, _), j in jobs.items() if (c, a) == (choice, arm)
                ]
                known = [kl for kl in found if kl is not None]
                cells.append(f"{sum(known) / len(known):.4f} ({len(known)})" if known else "")
            if any(cells):
                rows.append([choice, *cells])
        head = ["blocks", "no hint (seeds)", "auto (seeds)"]
        return markdown(head, rows) if rows else []

    # Scores

    def scores(self, name: str) -> list[tuple[float, float]]:
        """(score, KL) of the random maps; the score is one of `SCORES`."""
        from llm_distill.layers import LayerMap, Row, Similarity, covered, score

        line = self.plan.lines.get(self.plan.maps_job(0))
        found: list[tuple[float, float]] = []
        if line is None:
            return found
        import torch

        scored = {"segmentation": score, "coverage": covered}[name]
        values = torch.tensor(line["similarity"])
        pair = self.plan.settings.pair(self.plan.pair)
        for job in self.plan.drawn().values():
            kl = self.plan.kl(job)
            if kl is not None and math.isfinite(kl) and job.mapping is not None:
                rows = tuple(Row(s, teacher) for s, teacher in job.mapping)
                mapping = LayerMap(rows, pair.student.depth, pair.teacher.depth, "drawn")
                found.append((scored(mapping, Similarity(values, values)), kl))
        return found

    def correlation(self, name: str) -> tuple[float, int] | None:
        """Rank correlation of a score and KL, and of how many maps."""
        found = self.scores(name)
        if len(found) < 4:
            return None
        return spearman([one for one, _ in found], [kl for _, kl in found]), len(found)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    every = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in every]


def shown(rows: Rows | None) -> str:
    """A map in one line.

    >>> shown(((1, ((3, 1.0),)), (2, ((4, 0.3), (6, 0.7)))))
    '1←3 2←mix'
    """
    if rows is None:
        return ""
    return " ".join(_entries(rows))


def _entries(rows: Rows) -> Iterator[str]:
    for student, teacher in rows:
        yield f"{student}←{teacher[0][0] if len(teacher) == 1 else 'mix'}"


def named(winner: Line) -> str:
    """A race's winner in words."""
    if winner["rows"] is None:
        return "none"
    start = f", blockwise {winner['blockwise']:.2g}" if winner["blockwise"] else ""
    return f"{winner['name']} x {winner['weight']:g}{start}"
