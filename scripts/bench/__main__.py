"""`python -m scripts.bench head|step|mapping|cache|remote|placement|kinds`: the command line.

It imports torch when it has to run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import cache, placement
from scripts.bench import settings as asked
from scripts.bench.kinds import command as kinds
from scripts.bench.mapping import command as mapping
from scripts.bench.remote import command as remote

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.bench.settings import HeadSettings, StepSettings

WIDTH = 200
RESULTS = Path(__file__).parent / "RESULTS.md"
HELP = {
    "arms": "only those with one of these in their name, separated by commas",
    "batch": "sequences",
    "chunk": "rows of one GEMM; by default 256 (fp32), 512 (bf16), 2048 (CUDA)",
    "device": "by default cuda where there is one",
    "dtype": "of models, hidden states and heads",
    "length": "tokens of a sequence; of attention 0: 512, 1024 and 2048 in turn",
    "loss": "a divergence of llm_distill.losses, such as jsd:beta=0.5; attention: map_kl, map_mse",
    "queries": "sampled query rows of a sequence",
    "prompt": "fraction of each sequence that is not supervised",
    "reference": "dtype of the right answer",
    "rounds": "timed, after an untimed one; by default 5, 20 on CUDA",
    "rows": "supervised predictions",
    "seed": "of data and weights",
    "threads": "of the CPU; published ratios use one",
    "vocab": "tokens of both models",
}
CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": asked.DTYPES,
    "reference": asked.REFERENCES,
}
DECIDED_LATER = ("chunk", "device", "rounds")
"""Options whose default depends on the machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark, and print and write what came out."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    alone = {
        "mapping": mapping.execute,
        "cache": cache.execute,
        "remote": remote.execute,
        "placement": placement.execute,
        "kinds": kinds.execute,
    }
    if options.benchmark in alone:
        return alone[options.benchmark](options, argv)
    # Read by OpenMP when torch is imported, and by the processes that measure memory.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    settings = settled(options)
    from rich.console import Console

    from scripts.bench import run, table

    run.quiet()
    log = Console(stderr=True, highlight=False)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    reports = []
    try:
        for part in settings.parts():
            report = run.execute(
                options.benchmark, part, argv, lambda text: log.print(text, style="dim")
            )
            reports.append(report)
            shown = table.table(report), *table.facts(report.machine)
            console.print(*shown, sep="\n", soft_wrap=False)
    except ValueError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    if options.json:
        table.write_json(options.json, *reports)
    if options.markdown:
        for report in reports:
            table.append_markdown(options.markdown, report)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m scripts.bench", description=asked.__doc__)
    made.description = "How far llm_distill is from the floor, and beside which rivals."
    commands = made.add_subparsers(dest="benchmark", required=True)
    for name, kind in asked.KINDS.items():
        about = (kind.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=about, description=about)
        for field in dataclasses.fields(kind):
            _add(command, field)
        command.add_argument("--json", type=Path, help="file to write everything to")
        command.add_argument(
            "--markdown",
            type=Path,
            nargs="?",
            const=RESULTS,
            help="append a section to this file, by default RESULTS.md beside the benchmark",
        )
    about = "Automatic layer maps against the best one by hand."
    mapping.add(commands.add_parser("mapping", help=about, description=about))
    about = "What asking a server costs on this side of the line."
    remote.add(commands.add_parser("remote", help=about, description=about))
    about = "Bytes, fidelity and reading speed of cached teachers."
    cache.add(commands.add_parser("cache", help=about, description=about))
    about = "What each way of holding a large teacher takes and moves, reckoned."
    placement.add(commands.add_parser("placement", help=about, description=about))
    about = "A recipe of each kind of teacher, run to its end on the quickstart's models."
    kinds.add(commands.add_parser("kinds", help=about, description=about))
    return made


def settled(options: argparse.Namespace) -> HeadSettings | StepSettings:
    """Settings, with the defaults that depend on the machine."""
    kind = asked.KINDS[options.benchmark]
    given = {f.name: vars(options)[f.name] for f in dataclasses.fields(kind)}
    if given["device"] is None:
        import torch

        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if given["rounds"] is None:
        given["rounds"] = asked.ROUNDS[given["device"]]
    if "chunk" in given and given["chunk"] is None:
        given["chunk"] = asked.default_chunk(given["dtype"], given["device"])
    if given["device"] == "cpu" and sys.platform != "linux":
        given["memory"] = False  # peaks are read from /proc
    return kind(**given)


def _add(command: argparse.ArgumentParser, field: dataclasses.Field[object]) -> None:
    """One field of the settings as an option."""
    name = field.name.replace("_", "-")
    if field.name == "memory":
        command.add_argument("--no-memory", dest="memory", action="store_false", help="no peaks")
        return
    default = None if field.name in DECIDED_LATER else field.default
    about = HELP.get(field.name, "of the model")
    about += "" if default in (None, ()) else f" (default {default})"
    if field.name == "arms":
        command.add_argument("--arms", type=_names, default=(), help=about)
    elif field.name in CHOICES:
        choices = CHOICES[field.name]
        command.add_argument(f"--{name}", choices=choices, default=default, help=about)
    else:
        kind = int if field.name == "seed" else READERS[str(field.type)]
        command.add_argument(f"--{name}", type=kind, default=default, help=about)


def _text(text: str) -> str:
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; write 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{number} is no fraction from 0 to below 1")
    return number


READERS: dict[str, Callable[[str], Any]] = {"str": _text, "float": _share, "int": _positive}
"""By the type of a field."""


if __name__ == "__main__":
    sys.exit(main())
