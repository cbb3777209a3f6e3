"""What is to be done next, given what is finished: weights first, then the seeds that they need."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from scripts.bench.mapping.jobs import Job, Line, Lines, Rows, rows_of
from scripts.bench.mapping.settings import BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.bench.mapping.settings import Settings

HAND = ("uniform", "last", "skip", "first", "reverse", "random 0", "random 1", "random 2")
"""Maps that need no data: the best one is what `auto` is measured against."""

DATA = ("provenance", "arc_length", "segmentation", "coverage", "cka", "transport", "auto")
"""Maps that data decide."""

MANY = (
    "none",
    "last",
    "uniform",
    "segmentation",
    "coverage",
    "auto",
    "auto as shipped",
    "best hand as shipped",
    "auto_race",
)
"""Arms with many seeds; the best map by hand is one of them as well."""

SIDE = ("best hand as shipped", "best hand at race cost", "blockwise")
"""Studies of a map that has to be known first."""

STUDIES = ("auto as shipped", "auto_race", *SIDE, "scores")
"""What is measured beside the maps; `blocks` of pair a comes to it."""

ARMS = ("none", *HAND, *DATA, *STUDIES, "blocks")
"""Everything that `--arms` knows."""


class Plan:
    """The jobs of one pair.

    Args:
        settings: Of the benchmark.
        pair: Its letter.
        lines: What is finished of it.
        arms: Only these; a study needs the maps that it compares with. Empty: all.
        seeds: No more than so many; None: as many as the settings say.
    """

    def __init__(
        self,
        settings: Settings,
        pair: str,
        lines: Lines,
        arms: tuple[str, ...] = (),
        seeds: int | None = None,
    ) -> None:
        self.settings, self.pair, self.lines = settings, pair, lines
        self._arms, self._most = arms, seeds

    # What there is

    def wants(self, arm: str) -> bool:
        """Whether an arm was asked for."""
        return not self._arms or arm in self._arms

    def seeds(self, arm: str) -> range:
        """Of an arm."""
        many = arm in MANY or (arm in HAND and arm == self.best_hand())
        count = self.settings.many if many else self.settings.few
        return range(count if self._most is None else min(count, self._most))

    def mapping(self, arm: str, seed: int) -> Rows | None:
        """The map of an arm; None where there is none, as for a student that was not cut."""
        line = self.lines.get(self.maps_job(seed))
        return None if line is None or arm not in line["maps"] else rows_of(line["maps"][arm])

    def maps(self) -> list[str]:
        """The maps of this pair that were asked for."""
        there = [arm for arm in (*HAND, *DATA) if self.mapping(arm, 0) is not None]
        return [arm for arm in there if self.wants(arm)]

    def job(self, arm: str, seed: int, weight: float | None = None) -> Job | None:
        """The training of an arm, at its best weight unless told otherwise; None if not known."""
        plain = Job(self.pair, "run", seed, steps=self.settings.steps_of(self.pair))
        if arm == "none":
            return plain
        if arm == "auto_race":
            return replace(plain, mode="race")
        weight = self.best_weight(arm) if weight is None else weight
        if weight is None:
            return None
        if arm == "auto as shipped":
            return replace(plain, mode="shipped", weight=weight)
        rows = self.mapping(arm, seed)
        return None if rows is None else replace(plain, mapping=rows, weight=weight)

    def kl(self, job: Job | None) -> float | None:
        """What a finished job came to, infinite where it failed; None if it is not finished."""
        line = self.line(job)
        return None if line is None else math.inf if line["kl"] is None else float(line["kl"])

    def line(self, job: Job | None) -> Line | None:
        """The line of a job."""
        return None if job is None else self.lines.get(job)

    def best_weight(self, arm: str) -> float | None:
        """The weight with the least mean KL over the tuning seeds; None until all are there."""
        if arm in ("none", "auto_race"):
            return 0.0
        arm = "auto" if arm == "auto as shipped" else arm
        tried = self.weights_of(arm)
        means = {weight: self.mean(arm, weight) for weight in tried}
        known = {weight: kl for weight, kl in means.items() if kl is not None}
        return _least(known) if len(known) == len(tried) else None

    def weights_of(self, arm: str) -> tuple[float, ...]:
        """That a map is tried with: larger ones as long as the largest is the best."""
        tried = list(self.settings.weights)
        means = {weight: self.mean(arm, weight) for weight in tried}
        for weight in self.settings.wider:
            known = {weight: kl for weight, kl in means.items() if kl is not None}
            if len(known) < len(means) or not known or _least(known) != tried[-1]:
                break
            tried.append(weight)
            means[weight] = self.mean(arm, weight)
        return tuple(tried)

    def mean(self, arm: str, weight: float) -> float | None:
        """Mean KL over the tuning seeds; None until all are there."""
        found = [self.kl(self.job(arm, seed, weight)) for seed in self.tuning]
        known = [kl for kl in found if kl is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None

    @property
    def tuning(self) -> range:
        """Seeds that weights are chosen on."""
        return range(
            self.settings.tuning if self._most is None else min(self.settings.tuning, self._most)
        )

    def tuned(self, arm: str) -> float:
        """Mean KL over the tuning seeds at the best weight, infinite where it is not known."""
        weight = self.best_weight(arm)
        found = None if weight is None else self.mean(arm, weight)
        return math.inf if found is None else found

    def best_hand(self) -> str | None:
        """The map by hand with the least KL over the tuning seeds; None until all are there."""
        return self._best([arm for arm in self.maps() if arm in HAND])

    def best_map(self) -> str | None:
        """The same among all maps that blocks can learn alone by."""
        rising = [arm for arm in self.maps() if arm != "reverse" and _plain(self.mapping(arm, 0))]
        return self._best(rising)

    def _best(self, arms: list[str]) -> str | None:
        if not arms or any(self.best_weight(arm) is None for arm in arms):
            return None
        return min(arms, key=self.tuned)

    # What to do

    def pending(self) -> list[Job]:
        """Jobs that can be done now and are not finished."""
        missing = {job.key: job for job in self._now() if self.lines.get(job) is None}
        return list(missing.values())

    def _now(self) -> Iterator[Job]:
        """Jobs that can be done now, finished or not."""
        teachers = Job(self.pair, "models")
        yield teachers
        if self.lines.get(teachers) is None:
            return
        every = [self.maps_job(seed) for seed in self.seeds("none")]
        yield from every
        if any(self.lines.get(job) is None for job in every):
            return
        yield from self._independent()
        yield from self._arms_at_best()
        yield from self._beside()

    def maps_job(self, seed: int) -> Job:
        """Decides the maps of a seed."""
        return Job(self.pair, "maps", seed)

    def _independent(self) -> Iterator[Job]:
        """Arms that have no weight, and all weights of the others."""
        for arm in ("none", "auto_race"):
            if self.wants(arm):
                yield from self._jobs(arm)
        for arm in self.maps():
            for weight in self.weights_of(arm):
                for seed in self.tuning:
                    yield from _known(self.job(arm, seed, weight))

    def _arms_at_best(self) -> Iterator[Job]:
        """All seeds of each map at its best weight."""
        for arm in self.maps():
            yield from self._jobs(arm)
        if self.wants("auto as shipped"):
            yield from self._jobs("auto as shipped")

    def _beside(self) -> Iterator[Job]:
        """The studies that need to know the best map or weight."""
        for study in SIDE:
            if self.wants(study):
                for seed in self.seeds(study):
                    yield from _known(self.study(study, seed))
        if self.wants("scores"):
            yield from self.drawn().values()
        if self.wants("blocks"):
            yield from self.blocks().values()

    def _jobs(self, arm: str) -> Iterator[Job]:
        for seed in self.seeds(arm):
            yield from _known(self.job(arm, seed))

    # Studies

    def study(self, name: str, seed: int) -> Job | None:
        """The best map and blocks that learn alone, or the best by hand as one of `SIDE`."""
        if name == "blockwise":
            best = self.best_map()
            job = None if best is None else self.job(best, seed)
            return job and replace(job, blockwise=self.settings.blockwise)
        best, raced = self.best_hand(), self.lines.get(replace(self._run(seed), mode="race"))
        job = None if best is None else self.job(best, seed)
        if name == "best hand as shipped":
            return job and replace(job, mode="shipped")
        if job is None or raced is None or "race_steps" not in raced:
            return None
        return replace(job, steps=job.steps + raced["race_steps"])

    def drawn(self) -> dict[str, Job]:
        """Random maps at the best weight of `auto`, seed 0."""
        weight = self.best_weight("auto")
        names = [f"drawn {place}" for place in range(self.settings.maps)]
        jobs = {name: self.job(name, 0, weight) for name in names} if weight is not None else {}
        return {name: job for name, job in jobs.items() if job is not None}

    def blocks(self) -> dict[tuple[str, str, int], Job]:
        """(choice of blocks, arm, seed) -> training, where students are cut."""
        found: dict[tuple[str, str, int], Job] = {}
        if self.settings.pair(self.pair).start != "cut":
            return found
        for choice in BLOCKS:
            for arm in ("none", "auto"):
                for seed in self.seeds("blocks"):
                    job = self.job(arm, seed)
                    if job is not None:
                        found[choice, arm, seed] = replace(job, blocks=choice)
        return found

    def _run(self, seed: int) -> Job:
        return Job(self.pair, "run", seed, steps=self.settings.steps_of(self.pair))


def _known(job: Job | None) -> Iterator[Job]:
    if job is not None:
        yield job


def _least(means: dict[float, float]) -> float:
    """The weight with the least mean."""
    return min(means, key=lambda weight: means[weight])


def _plain(rows: Rows | None) -> bool:
    """Whether a map has one teacher layer for each student layer, both rising."""
    if rows is None or any(len(teacher) != 1 for _, teacher in rows):
        return False
    ends = [teacher[0][0] for _, teacher in rows]
    layers = [s for s, _ in rows]
    return all(one < other for side in (ends, layers) for one, other in pairwise(side))
