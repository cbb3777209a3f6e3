"""Plots: KL of every arm with its interval, and score against KL of random maps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scripts.bench.mapping.tables import MEASURED, SCORES

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.mapping.tables import Results

DPI = 90
GREY, BLUE, ORANGE = "#888888", "#1f5fa8", "#d9730d"


def arms(results: Results, path: Path) -> bool:
    """One line per arm; whether there was anything to draw."""
    from matplotlib.figure import Figure

    found = {arm: results.mean(arm) for arm in results.arms()}
    found = {arm: figures for arm, figures in found.items() if math.isfinite(figures[0])}
    if not found:
        return False
    figure = Figure(figsize=(6.5, 1.2 + 0.27 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, (arm, (mean, low, high)) in enumerate(found.items()):
        colour = ORANGE if arm in MEASURED else BLUE if arm == results.best else GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([mean], [place], "o", color=colour)
        values = [line["kl"] for line in results.lines(arm).values()]
        axes.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("held-out KL(teacher || student), nats; mean and 95 % interval over seeds")
    title = results.plan.settings.pair(results.plan.pair).title
    axes.set_title(f"({results.plan.pair}) {title}", fontsize=10)
    _save(figure, path)
    return True


def scores(every: list[Results], path: Path) -> bool:
    """One row per score and one panel per pair; whether there was anything to draw."""
    from matplotlib.figure import Figure

    shown = [results for results in every if results.scores(SCORES[0])]
    if not shown:
        return False
    figure = Figure(figsize=(3.1 * len(shown), 2.7 * len(SCORES)), layout="constrained")
    panels = figure.subplots(len(SCORES), len(shown), squeeze=False)
    for name, row in zip(SCORES, panels, strict=True):
        for axes, results in zip(row, shown, strict=True):
            points = results.scores(name)
            kls = [kl for _, kl in points]
            axes.plot([one for one, _ in points], kls, "o", color=BLUE, alpha=0.7)
            found = results.correlation(name)
            rank = f", rank correlation {found[0]:+.2f}" if found else ""
            axes.set_title(f"({results.plan.pair}){rank}", fontsize=9)
            axes.set_xlabel(f"{name} score")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("held-out KL")
    _save(figure, path)
    return True


def _save(figure: object, path: Path) -> None:
    """Small, and without a date: the same results give the same file."""
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
