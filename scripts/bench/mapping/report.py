"""All results as one Markdown file with plots beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.bench.mapping import figures
from scripts.bench.mapping.plan import HAND
from scripts.bench.mapping.statistics import MARGIN, goal, verdict
from scripts.bench.mapping.tables import MEASURED, SCORES, Results, markdown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from scripts.bench.mapping.plan import Plan
    from scripts.bench.mapping.settings import Settings

STARTS = {"least_squares": "at least squares", "random": "at random"}

SECTIONS = {
    "weights": "Every map at every weight, mean over the seeds that weights are chosen on",
    "race": "What won the race",
    "beside": "Other paired differences",
    "blocks": "Which blocks the student starts from, at the same weight",
}


def write(path: Path, settings: Settings, plans: Sequence[Plan], facts: Mapping[str, str]) -> None:
    """The report, and its plots in `figures` beside it.

    Args:
        path: Of the Markdown file.
        settings: Of the benchmark.
        plans: Of the pairs.
        facts: Command, text, machine and versions.
    """
    every = [Results(plan) for plan in plans]
    drawn = path.parent / "figures"
    text = [*_head(settings, plans, facts), *_goal(every), *_correlations(every, drawn)]
    for results in every:
        text += _pair(results, drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def _head(settings: Settings, plans: Sequence[Plan], facts: Mapping[str, str]) -> list[str]:
    """What was done, and where."""
    lines = [line for plan in plans for line in plan.lines.every()]
    hours = sum(line["cpu"] for line in lines) / 3600
    s = settings
    weights = ", ".join(f"{weight:g}" for weight in s.weights)
    wider = " or ".join(f"{weight:g}" for weight in s.wider)
    beyond = f" (or {wider}, where the largest so far is the best)" if s.wider else ""
    return [
        "# Layer maps: automatic ones against the best by hand",
        "",
        f"{s.steps} steps of AdamW with a cosine, {s.batch} sequences of {s.length} bytes each, "
        "trained by `DistillTrainer` with `Logits` and `HiddenStates`; gate and fading off but in "
        f"*as shipped*; where widths differ, projectors start {STARTS[s.init]}. "
        "Figure: KL(teacher || student) on "
        f"{s.held_out} held-out passages, nats per byte that is asked for. Every map has its best "
        f"weight of {weights}{beyond}, chosen on {s.tuning} seeds; arms are paired: same seed, "
        "data order and first weights. Intervals are 95 % bootstraps, differences over seeds x "
        "passages. The "
        f"best map by hand is that of {', '.join(HAND)} with the least KL over the seeds that "
        "weights are chosen on.",
        "",
        *(f"- {what}: {fact}" for what, fact in facts.items()),
        f"- {len(lines)} jobs, {hours:.1f} CPU hours",
        "",
    ]


def _goal(every: Sequence[Results]) -> Iterator[str]:
    """The verdict on each pair, and on all."""
    yield from (f"## As good as the best by hand (within {MARGIN} % of KL)?", "")
    for arm in MEASURED:
        found = [results.versus(arm, results.best) for results in every]
        yield f"`{arm}`: {goal(found)}."
        yield ""
        for results, one in zip(every, found, strict=True):
            best = results.best
            yield f"- ({results.plan.pair}) {verdict(arm, one, best)}"
        yield ""


def _correlations(every: Sequence[Results], drawn: Path) -> Iterator[str]:
    """Do the scores that strategies maximise say anything?"""
    rows = []
    for results in every:
        found = [results.correlation(name) for name in SCORES]
        ranks = [f"{one[0]:+.2f}" for one in found if one is not None]
        if ranks:
            maps = len(results.scores(SCORES[0]))
            rows.append([f"({results.plan.pair})", *ranks, str(maps)])
    if not rows:
        return
    yield from ("## Scores of a map and its final KL, over random rising maps, one seed", "")
    yield from ("Rank correlations; wanted: near -1.", "")
    yield from markdown(["pair", *SCORES, "maps"], rows)
    yield ""
    if figures.scores(list(every), drawn / "mapping_scores.png"):
        yield from ("![Score against KL](figures/mapping_scores.png)", "")


def _pair(results: Results, drawn: Path) -> Iterator[str]:
    """Everything about one pair."""
    plan = results.plan
    pair = plan.settings.pair(plan.pair)
    yield from (f"## ({plan.pair}) {pair.title}", "")
    yield f"{pair.teacher} → {pair.student}, student {pair.start}, learning rate {pair.rate:g}."
    made = [
        line for line in plan.lines.every() if (line["pair"], line["kind"]) == (plan.pair, "models")
    ]
    for line in made:
        yield f"Student: {plan.settings.steps_of(plan.pair)} steps."
        yield f"Teacher: {pair.teacher_steps} steps, cross-entropy {line['teacher_ce']:.3f} nats."
    yield ""
    if figures.arms(results, drawn / f"mapping_{plan.pair}.png"):
        yield from (f"![KL of every arm](figures/mapping_{plan.pair}.png)", "")
    if results.arms():
        yield from results.table()
        yield ""
    for name, title in SECTIONS.items():
        found: list[str] = getattr(results, name)()
        if len(found) > 2:
            yield from (f"### ({plan.pair}) {title}", "", *found, "")
