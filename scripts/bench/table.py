"""The report for people: a table in the terminal, a section in a Markdown file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.table import Table

    from scripts.bench.machine import Machine
    from scripts.bench.report import Report, Result

SHORT = 14
MEASURED = {
    "cpu": "CPU seconds of the process, {threads} thread{s}",
    "cuda": "seconds of the GPU between two events",
}


def heads(report: Report) -> list[str]:
    """Names of the columns."""
    errors = [f"{name} err" for name in _error_names(report)]
    peaks = ["peak MiB", *(["reserved MiB"] if _on_gpu(report) else [])]
    peaks += ["peak - g, [N, V]"] if "logits_mib" in report.facts else []
    peaks += [f"x {report.lean.split(',')[0]} peak"] if report.lean else []
    shown = peaks if report.settings.memory else []
    return ["arm", "min s", "median s", *report.columns, *shown, *errors, "computes"]


def rows(report: Report) -> Iterator[list[str]]:
    """One list of cells for each arm, as long as `heads`."""
    names = _error_names(report)
    for result in report.results:
        ratios = report.ratios(result)
        yield [
            result.name,
            *_seconds(result),
            *(_pair(ratios.get(column)) for column in report.columns),
            *_peaks(report, result),
            *(f"{result.errors[name]:.1e}" if name in result.errors else "-" for name in names),
            _computes(report, result),
        ]


def table(report: Report) -> Table:
    """For the terminal."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(report.title), title_justify="left", caption_justify="left")
    for head in heads(report):
        side = head in ("arm", "computes")
        made.add_column(
            head,
            justify="left" if side else "right",
            no_wrap=side,
        )
    for cells in rows(report):
        made.add_row(*map(escape, cells))
    made.caption = escape(caption(report))
    return made


def caption(report: Report) -> str:
    """What the numbers are."""
    s = report.settings
    clock = MEASURED[s.device].format(threads=s.threads, s="" if s.threads == 1 else "s")
    gradients, logits = report.facts["gradients_mib"], report.facts.get("logits_mib")
    parts = [
        f"{clock}; {s.rounds} interleaved rounds after an untimed one; "
        "ratios of minima (of medians)",
        *(f"{name}: divided by {' + '.join(arms)}" for name, arms in report.columns.items()),
        f"gradients that any method returns: {gradients:.0f} MiB"
        if logits is None
        else f"peak - g: the peak besides the {gradients:.0f} MiB of gradients that any method "
        f"returns, in fp32 [N, V] of {logits:.0f} MiB",
        "err: relative, against the dense way" + (f", {_meant(s.reference)}" if logits else ""),
        *(f"{result.name}: {note}" for result in report.results if (note := _note(result))),
    ]
    return "\n".join(parts)


def markdown(report: Report) -> str:
    """A section."""
    columns = heads(report)
    lines = [
        f"## {report.title}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(' --- ' if c in ('arm', 'computes') else ' ---: ' for c in columns)}|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in rows(report)),
        "",
        *(f"- {line}" for line in caption(report).splitlines()),
        *(f"- {line}" for line in facts(report.machine)),
        "",
        "```",
        report.machine.command,
        "```",
        "",
    ]
    return "\n".join(lines)


def facts(machine: Machine) -> list[str]:
    """Where it ran."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return [
        f"{machine.gpu or machine.processor}, {machine.memory_gib:.0f} GiB; {machine.system}",
        f"GEMMs by {machine.backend}; load {machine.load:.1f} at the start",
        versions,
        f"commit {machine.commit or 'unknown'}, {machine.started}",
    ]


def write_json(path: Path, *reports: Report) -> None:
    """Everything, for programs: one report, or a list of several."""
    found = [report.to_json() for report in reports]
    content = found[0] if len(found) == 1 else found
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def append_markdown(path: Path, report: Report) -> None:
    """The section of a report at the end of a file."""
    append(path, markdown(report))


def append(path: Path, section: str) -> None:
    """A section at the end of a file, which is made where it is missing."""
    start = path.read_text(encoding="utf-8") if path.exists() else "# Benchmark results\n"
    path.write_text(f"{start.rstrip()}\n\n{section.rstrip()}\n", encoding="utf-8")


def section(title: str, table: Sequence[str], notes: Sequence[str], command: str) -> str:
    """A title, a table in Markdown, what has to be known of it, and what printed it."""
    about = [f"- {text}" for text in notes]
    return "\n".join([f"## {title}", "", *table, "", *about, "", "```", command, "```"])


def _on_gpu(report: Report) -> bool:
    return report.settings.device == "cuda"


def _error_names(report: Report) -> list[str]:
    """All that was compared, in the order of first appearance."""
    return list(dict.fromkeys(name for result in report.results for name in result.errors))


def _pair(ratio: tuple[float, float] | None) -> str:
    """Of minima, and in brackets of medians."""
    return "-" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f})"


def _seconds(result: Result) -> list[str]:
    """Minimum and median."""
    if result.times is None:
        return ["-", "-"]
    return [f"{result.times.least:.4f}", f"{result.times.middle:.4f}"]


def _peaks(report: Report, result: Result) -> list[str]:
    """Peak, reserved on a GPU, in [N, V] besides the gradients, and over the lean arm."""
    spare, lean = report.above_gradients(result), report.leanness(result)
    peak = result.peak
    cells = ["-" if peak is None else f"{peak.used:.0f}"]
    if _on_gpu(report):
        cells.append("-" if peak is None or peak.reserved is None else f"{peak.reserved:.0f}")
    if "logits_mib" in report.facts:
        cells.append("-" if spare is None else f"{spare:.2f}")
    if report.lean:
        cells.append("-" if lean is None else f"{lean:.2f}")
    return cells if report.settings.memory else []


def _computes(report: Report, result: Result) -> str:
    """Whether it computes the same; or why it computes nothing, where that is short."""
    if result.missing is None:
        return report.verdict(result)
    return "nothing" if len(result.missing) > SHORT else result.missing


def _note(result: Result) -> str:
    """What a reader has to know, and why an arm is missing."""
    return "; ".join(filter(None, (result.missing, result.note)))


def _meant(reference: str) -> str:
    """What the right answer is."""
    return "in float64" if reference == "float64" else "with an fp32 softmax of the same logits"
