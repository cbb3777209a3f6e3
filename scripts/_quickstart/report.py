"""The final table, the samples, and what they show."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

    from scripts._quickstart.measure import Row

COMPARED = {"perplexity": ("perplexity", -1), "kl": ("KL", -1), "agreement": ("agreement", 1)}
"""Figures that decide, with their names, and whether more of them is better (1) or less (-1)."""


def table(rows: Sequence[Row]) -> Table:
    """All figures."""
    from rich.table import Table

    made = Table(title="On held-out text", title_justify="left")
    made.add_column("model")
    heads = ("perplexity", "KL to teacher", "agreement", "parameters", "tokens/s")
    for head in heads:
        made.add_column(head, justify="right")
    for row in rows:
        made.add_row(
            row.name,
            f"{row.perplexity:,.1f}",
            f"{row.kl:.3f}",
            f"{row.agreement:.1%}",
            f"{row.parameters:,}",
            f"{row.speed:,.0f}",
        )
    made.caption = "KL in nats per token; agreement on the likeliest token; tokens/s of reading"
    made.caption_justify = "left"
    return made


def samples(rows: Sequence[Row], prompt: str) -> Table:
    """How each model goes on with the prompt."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(f'"{prompt} ..."'), title_justify="left", show_header=False)
    made.add_column("model", no_wrap=True)
    made.add_column("continuation")
    for row in rows:
        made.add_row(row.name, Text(row.sample))
    return made


def verdict(twin: Row, distilled: Row) -> str:
    """Whether distillation helped, in one sentence, from the figures alone."""
    ours, theirs = asdict(distilled), asdict(twin)
    better = [n for key, (n, sign) in COMPARED.items() if sign * (ours[key] - theirs[key]) > 0]
    figures = (
        f"perplexity {distilled.perplexity:.1f} against {twin.perplexity:.1f}, "
        f"KL to the teacher {distilled.kl:.3f} against {twin.kl:.3f} nats per token, "
        f"agreement {distilled.agreement:.1%} against {twin.agreement:.1%}"
    )
    if len(better) == len(COMPARED):
        return f"The distilled student beats its twin: {figures}."
    if not better:
        return f"The distilled student does not beat its twin: {figures}."
    return f"Mixed: the distilled student is better in {' and '.join(better)} only: {figures}."


def write(path: Path, rows: Sequence[Row], facts: Mapping[str, object]) -> None:
    """Everything that was shown, for programs."""
    content = {**facts, "models": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
