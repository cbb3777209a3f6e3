"""The command line of `python -m scripts.bench mapping`. It imports torch when it has to run."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.bench.mapping.jobs import Lines
from scripts.bench.mapping.plan import ARMS, Plan
from scripts.bench.mapping.settings import PAIRS, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

REPORT = Path(__file__).resolve().parents[1] / "MAPPING.md"
WORK = Path("out/mapping")


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--pair", choices=sorted(PAIRS), action="append", help="by default all")
    arms = f"only these, separated by commas: {', '.join(ARMS)}"
    parser.add_argument("--arms", type=_arms, default=(), help=arms)
    parser.add_argument(
        "--seeds", type=_count, help="at most so many (default: 8, 3 for most arms)"
    )
    parser.add_argument("--jobs", type=_jobs, default=2, help="processes; 0: this one (default 2)")
    parser.add_argument(
        "--text", type=Path, help="plain text (default: what Python says of itself)"
    )
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder (default {WORK})")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report")
    parser.add_argument("--to", type=Path, default=REPORT, help="file of the report")
    parser.add_argument("--quick", action="store_true", help="next to nothing of it, for tests")
    parser.add_argument("--steps", type=_count, help="of one training")
    start = "of the projectors, where widths differ (default least_squares)"
    parser.add_argument("--init", choices=("random", "least_squares"), help=start)


def execute(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Train what is not finished, or write the report."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from scripts.bench.mapping import pool
    from scripts.bench.mapping.texts import Texts

    if options.text is not None and not options.text.exists():
        sys.stderr.write(f"bench: there is no text {options.text}; leave --text out, or name one\n")
        return 1
    texts = Texts.read(options.text)
    settings = Settings(text=texts.digest)
    if options.steps:
        settings = replace(settings, steps=options.steps)
    if options.init:
        settings = replace(settings, init=options.init)
    settings = settings.quick() if options.quick else settings
    plans = [
        Plan(
            settings,
            name,
            Lines(options.work / f"{name}-{settings.digest(name)}" / "results.jsonl"),
            options.arms,
            options.seeds,
        )
        for name in options.pair or sorted(PAIRS)
    ]
    if options.report:
        _report(options, settings, plans)
        return 0
    if not options.jobs:
        pool.quiet()
    text = None if options.text is None else str(options.text.resolve())
    work = pool.Work(settings, plans, text, _tell)
    for plan in plans:
        _tell(f"{plan.lines.path}: {len(plan.lines)} finished")
    work.run(options.jobs)
    _tell(
        f"{sum(len(plan.lines) for plan in plans)} finished, {len(work.failed)} failed: "
        f"python -m scripts.bench {' '.join(argv)}"
    )
    return 1 if work.failed else 0


def _report(options: argparse.Namespace, settings: Settings, plans: list[Plan]) -> None:
    """Write it."""
    from scripts.bench import machine
    from scripts.bench.mapping import report

    here = machine.described()
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    text = "the text of the quickstart" if options.text is None else f"`{options.text.name}`"
    facts = {
        "Command": f"`python -m scripts.bench mapping` on {text}",
        "Machine": here,
        "Versions": versions,
    }
    report.write(options.to, settings, plans, facts)
    _tell(f"{options.to}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arms(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [arm for arm in found if arm not in ARMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no arm; there are {', '.join(ARMS)}")
    return found


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; write 1 or more")
    return number


def _jobs(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is no number of processes; write 0 or more")
    return number
