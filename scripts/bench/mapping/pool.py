"""Doing all jobs, in several processes of one core each, until nothing is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.bench.mapping.jobs import Job, Line
    from scripts.bench.mapping.plan import Plan
    from scripts.bench.mapping.settings import Settings

Tell = Callable[[str], None]

QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What a process is told before it imports torch."""


class Work:
    """A benchmark that goes on where it was stopped.

    Args:
        settings: What is trained.
        plans: Of the pairs that were asked for, each with its lines.
        text: File of the text; None: that of the quickstart.
        tell: Is told what is finished.
    """

    def __init__(
        self, settings: Settings, plans: Sequence[Plan], text: str | None, tell: Tell
    ) -> None:
        self._settings, self._plans = settings, plans
        self._lines = {plan.pair: plan.lines for plan in plans}
        self._text, self._tell = text, tell
        self.failed: set[str] = set()

    def pending(self) -> list[Job]:
        """Jobs that can be done now, pair by pair; those that failed are left out."""
        jobs = {job.key: job for plan in self._plans for job in plan.pending()}
        return [job for key, job in jobs.items() if key not in self.failed]

    def run(self, processes: int) -> None:
        """Do everything; 0 processes: in this one."""
        if not processes:
            while jobs := self.pending():
                self._here(jobs[0])
            return
        os.environ.update(QUIET)
        with ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=quiet
        ) as pool:
            at_work: dict[Future[Line], Job] = {}
            while True:
                busy = {job.key for job in at_work.values()}
                free = [job for job in self.pending() if job.key not in busy]
                for job in free[: processes - len(at_work)]:
                    at_work[pool.submit(perform, *self._asked(job))] = job
                if not at_work:
                    return
                for done in wait(at_work, return_when=FIRST_COMPLETED).done:
                    self._finished(at_work.pop(done), done)

    def _asked(self, job: Job) -> tuple[Job, Settings, str | None, str]:
        """What `perform` is given."""
        folder = str(self._lines[job.pair].path.parent)
        return job, self._settings, self._text, folder

    def _here(self, job: Job) -> None:
        """One job in this process."""
        future: Future[Line] = Future()
        try:
            future.set_result(perform(*self._asked(job)))
        except Exception as error:  # told, and left for the next start
            future.set_exception(error)
        self._finished(job, future)

    def _finished(self, job: Job, done: Future[Line]) -> None:
        """Write a line, or tell of a failure; the next start tries it again."""
        error = done.exception()
        if error is not None:
            self.failed.add(job.key)
            self._tell(f"failed: {job}: {type(error).__name__}: {error}")
            return
        line = done.result()
        self._lines[job.pair].add(job, line)
        figure = f" KL {line['kl']:.4f}" if line.get("kl") is not None else ""
        what = f"weight {job.weight:g}, {job.mode}" if job.kind == "run" else ""
        told = (
            f"{job.pair} {job.kind} seed {job.seed} {what}{figure}, {line['cpu']:.1f} CPU seconds"
        )
        self._tell(f"{sum(map(len, self._lines.values()))} finished: {told}")


def perform(job: Job, settings: Settings, text: str | None, folder: str) -> Line:
    """`runs.do`, imported where it is done."""
    from scripts.bench.mapping import runs

    return runs.do(job, settings, text, folder)


def quiet() -> None:
    """Let third parties speak of errors only."""
    import logging
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger("llm_distill").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
