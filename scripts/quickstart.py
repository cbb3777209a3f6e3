"""A teacher, a student distilled from it, and its twin without a teacher, in minutes on a CPU.

Run it with `bash scripts/quickstart.sh`, or `python -m scripts.quickstart` where all is installed.
With other `--steps` the teacher of an earlier run is used again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scripts._quickstart.corpus import NoTextError
from scripts._quickstart.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from scripts._quickstart.corpus import Corpus
    from scripts._quickstart.measure import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; it returns 0 whoever wins."""
    settings = parse(sys.argv[1:] if argv is None else argv)
    quiet()
    from rich.console import Console

    try:
        run(settings, Console(highlight=False))
    except NoTextError as error:
        sys.stderr.write(f"quickstart: {error}\n")
        return 1
    return 0


def parse(argv: Sequence[str]) -> Settings:
    """Settings from arguments."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart.sh",
        description="Train a teacher, distil a student from it, and compare it with a twin that "
        "was trained without.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    parser.add_argument("--steps", type=_positive, default=300, help="of both students")
    parser.add_argument("--teacher-steps", type=_positive, default=700, help="of the teacher")
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder")
    return Settings(**vars(parser.parse_args(argv)))


def quiet() -> None:
    """Let third parties speak of errors only, and keep their progress bars for training."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run(settings: Settings, console: Console) -> None:
    """All steps, from text to verdict."""
    from scripts._quickstart import corpus, students, teacher

    start = time.perf_counter()
    console.print("[bold]1. Text[/]: what Python says about itself")
    text = corpus.read_corpus()
    text.write(settings.train_text, settings.eval_text)
    console.print(f"   {len(text.train):,} characters to train on, {len(text.held_out):,} held out")
    console.print(f"[bold]2. Teacher[/]: 6 layers of width 192, {settings.teacher_steps:,} steps")
    if teacher.find_or_train(text, settings):
        console.print(f"   {settings.teacher} is from an earlier run with the same settings")
    console.print(f"[bold]3. Distilled student[/]: {settings.steps:,} steps, as this recipe says")
    students.show(settings)
    distilled = students.train(students.DISTILLED, settings)
    console.print("[bold]4. Its twin[/]: the same, with cross-entropy alone")
    twin = students.train(students.TWIN, settings)
    rows, prompt = _rows(text, settings, twin, distilled)
    _tell(rows, prompt, settings, console, time.perf_counter() - start)


def _rows(
    text: Corpus, settings: Settings, twin: dict[str, float], distilled: dict[str, float]
) -> tuple[list[Row], str]:
    """The rows of the table, and the prompt of their samples."""
    from scripts._quickstart import students
    from scripts._quickstart.measure import measure, prompt_of

    prompt = prompt_of(text.held_out)
    own = {"perplexity": distilled["eval_teacher_perplexity"], "kl": 0.0, "agreement": 1.0}
    rows = [measure("teacher", settings.teacher, own, prompt)]
    for label, name, found in (
        ("SFT twin", students.TWIN, twin),
        ("distilled", students.DISTILLED, distilled),
    ):
        figures = {key: found[f"eval_{key}"] for key in own}
        rows.append(measure(label, settings.student(name), figures, prompt))
    return rows, prompt


def _tell(
    rows: list[Row], prompt: str, settings: Settings, console: Console, seconds: float
) -> None:
    """Print and write the results."""
    from scripts._quickstart import report

    said = report.verdict(*rows[1:])
    console.print(report.table(rows), report.samples(rows, prompt), sep="\n")
    console.print(f"[bold]{said}[/]")
    facts = {
        "seed": settings.seed,
        "steps": settings.steps,
        "teacher_steps": settings.teacher_steps,
        "prompt": prompt,
        "verdict": said,
        "seconds": round(seconds, 1),
    }
    report.write(settings.output / "report.json", rows, facts)
    console.print(f"{seconds:.0f} seconds; the student is in {settings.student('distilled')}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} steps train nothing; write 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
