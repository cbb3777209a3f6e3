"""`kinds`: a recipe of each kind of teacher, from the command line, on the quickstart's models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.kinds.recipes import COLUMN, Kind, kinds
from scripts.bench.mapping.tables import markdown

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "scripts" / "bench" / "RESULTS.md"
HEADS = ("teacher", "processes", "perplexity", "KL to the teacher", "agreement, %", "s")
FIGURES = ("eval_perplexity", "eval_kl", "eval_agreement")
ABOUT = (
    "The quickstart's recipe with another teacher, less steps and less text; of teachers that tell "
    "a few tokens without hints and maps; the four made of the student go on from the one that was "
    "distilled",
    "Routed sends every other line to the second teacher, which is the distilled student",
    "KL of students of sparse teachers is to what these tell: of a top k less than to all they "
    "know, of draws more; DeepToShallow has no second model to compare with",
    "s: of the command, a cache written first included, whatever else the machine did",
)


@dataclass(frozen=True)
class Ended:
    """How a recipe ended.

    Attributes:
        kind: Which.
        figures: What it was evaluated to; empty where it failed.
        seconds: It took.
        error: The last of what it said where it failed.
    """

    kind: Kind
    figures: dict[str, float]
    seconds: float
    error: str = ""

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        if self.error:
            return self.kind.name, str(self.kind.processes), "failed", "-", "-", "-"
        perplexity, kl, agreement = (self.figures.get(name) for name in FIGURES)
        return (
            self.kind.name,
            str(self.kind.processes),
            "-" if perplexity is None else f"{perplexity:.1f}",
            "-" if kl is None else f"{kl:.3f}",
            "-" if agreement is None else f"{100 * agreement:.1f}",
            f"{self.seconds:.0f}",
        )


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    about = "of the quickstart, which has to have run (default out/quickstart)"
    parser.add_argument("--folder", type=Path, default=Path("out/quickstart"), help=about)
    parser.add_argument("--steps", type=int, default=100, help="of each (default 100)")
    parser.add_argument("--only", default="", help="kinds with this in their names")
    parser.add_argument("--markdown", type=Path, nargs="?", const=RESULTS, help="append here")


def execute(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run them all; the exit code tells whether one failed."""
    from rich.console import Console
    from rich.table import Table

    from scripts.bench.machine import Machine
    from scripts.bench.settings import HeadSettings
    from scripts.bench.table import append, facts, section

    missing = [
        n for n in ("teacher", "distilled", "train.txt") if not (options.folder / n).exists()
    ]
    if missing:
        sys.stderr.write(
            f"bench: {options.folder} has no {missing[0]}; run bash scripts/quickstart.sh\n"
        )
        return 1
    machine, log = Machine.here(HeadSettings(), argv), Console(stderr=True, highlight=False)
    table = Table(*HEADS, title=f"{options.steps} steps from each kind of teacher")
    ended = []
    for done in run_all(options.folder.resolve(), options.steps, options.only):
        ended.append(done)
        log.print(" · ".join(done.cells()), done.error, style="dim", soft_wrap=True)
        table.add_row(*done.cells())
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    if options.markdown is not None:
        title = f"kinds: {options.steps} steps from each kind, on the quickstart's models"
        shown = markdown(HEADS, [done.cells() for done in ended])
        made = section(title, shown, [*ABOUT, *facts(machine)], machine.command)
        append(options.markdown, made)
    return int(any(done.error for done in ended))


def run_all(folder: Path, steps: int, only: str = "") -> Iterator[Ended]:
    """Every kind, one after the other."""
    import yaml

    base = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    text = {"path": str(folder / "train.txt"), "eval": str(folder / "eval.txt")}
    length = json.loads((folder / "teacher" / "config.json").read_text(encoding="utf-8"))
    base["data"] = {**text, "max_length": length["max_position_embeddings"]}
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        routed = {"path": here / "train.jsonl", "eval": here / "eval.jsonl"}
        for rows in routed.values():
            _route(folder / f"{rows.stem}.txt", rows)
        every = kinds(folder, here / "caches", {k: str(path) for k, path in routed.items()})
        for k, kind in enumerate(kind for kind in every if only in kind.name):
            with serving(folder / "teacher", wanted=kind.remote) as url:
                recipe = kind.recipe(base, here / f"student-{k}", steps, url)
                path = here / f"{k}.yaml"
                path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
                yield run(kind, path, Path(recipe["training"]["output_dir"]))


def run(kind: Kind, recipe: Path, out: Path) -> Ended:
    """One recipe, as a user runs it."""
    started = time.perf_counter()
    commands = (["cache"] if kind.cached else []) + ["run"]
    for command in commands:
        launcher = [sys.executable, "-m"]
        if kind.processes > 1:
            count = str(kind.processes)
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", count, "-m"]
        done = subprocess.run(
            [*launcher, "llm_distill", command, str(recipe)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return Ended(kind, {}, time.perf_counter() - started, done.stderr[-2000:] or "failed")
    figures = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    return Ended(kind, figures, time.perf_counter() - started)


@contextmanager
def serving(folder: Path, *, wanted: bool) -> Iterator[str]:
    """The teacher behind a server, where one is wanted; its address."""
    if not wanted:
        yield ""
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.teacher_server import TeacherServer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with TeacherServer(model.eval(), AutoTokenizer.from_pretrained(folder)) as server:
        yield server.url


def _route(text: Path, rows: Path) -> None:
    """Lines as rows that name their experts in turn."""
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    made = (json.dumps({"text": line, COLUMN: "ab"[k % 2]}) for k, line in enumerate(lines))
    rows.write_text("\n".join(made) + "\n", encoding="utf-8")
