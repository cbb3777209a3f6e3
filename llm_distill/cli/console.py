"""What the command line shows: tables for people, on the first process only."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_distill import schedules
from llm_distill.balance import Balance
from llm_distill.layers import LayerEvidence, LayerMap, Similarity
from llm_distill.layers.map import target
from llm_distill.measures import KL_OF_FEW, of_few_tokens
from llm_distill.objectives import Objective, Term, named
from llm_distill.plots import segments
from llm_distill.signals import ModelSpec

FIGURES = {
    "eval_perplexity": "perplexity",
    "eval_teacher_perplexity": "perplexity of the teacher",
    "eval_kl": "KL(teacher || student), nats per token",
    "eval_agreement": "top-1 agreement with the teacher",
    "eval_entropy": "entropy of the student, nats per token",
    "eval_loss": "loss",
}
"""Metrics that have words of their own, in the order of the table."""


class Screen:
    """Tables on the standard output.

    Args:
        speaks: False for all processes but the first.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._console = Console(quiet=not speaks, highlight=False)

    def say(self, text: str) -> None:
        """One line; square brackets are no markup."""
        self._console.print(Text(text), soft_wrap=True)

    def models(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Student and teacher side by side."""
        table = _table("", "student", "teacher")
        for field in ("name", "kind", "depth", "width", "heads", "vocabulary", "positions"):
            table.add_row(field, *(_cell(vars(spec)[field]) for spec in (student, teacher)))
        self._console.print(table)

    def objectives(self, objectives: Sequence[Objective], terms: Mapping[str, Term]) -> None:
        """What is matched, how much it counts, and which layer learns from which."""
        table = _table("objective", "weight", "what")
        pairs = zip(named(objectives).items(), terms.values(), strict=True)
        for (name, objective), term in pairs:
            trained = sum(p.numel() for p in term.parameters())
            told = [objective.describe(), *term.notes]
            told += [f"{trained:,} trained parameters, not part of the student"] if trained else []
            lines = "\n".join(filter(None, told))
            table.add_row(name, Text(schedules.describe(objective.weight)), Text(lines))
        self._console.print(table)

    def balance(self, balance: Balance) -> None:
        """How the weights move; nothing where they do not."""
        if balance.describe():
            self.say(f"Balance: {balance.describe()}")

    def layer_map(self, name: str, mapping: LayerMap, evidence: LayerEvidence) -> None:
        """Which layer learns from which, with the figures that speak for it."""
        runs = segments(mapping)
        weighed = len({row.weight for row in mapping.rows}) > 1
        columns = {
            "student layer": [str(row.student) for row in mapping.rows],
            f"teacher layer of {mapping.teacher_depth}": [target(row) for row in mapping.rows],
            "finishes blocks": [f"{a}-{b}" if a < b else f"{b}" for a, b in runs],
            "CKA of these with their last": _within(runs, evidence.similarity),
            "similarity to the student's": _between(mapping, evidence.cross),
            "weight": [f"{row.weight:g}" for row in mapping.rows] if weighed else [],
        }
        shown = {head: cells for head, cells in columns.items() if cells}
        table = _table(*shown)
        for cells in zip(*shown.values(), strict=True):
            table.add_row(*map(Text, cells))
        trained = ", shares are trained" if mapping.trained else ""
        self.say(f"{name}: {mapping.origin}{trained}")
        self._console.print(table)
        for what, figure in mapping.evidence:
            self.say(f"{what}: {figure:.4g}")

    def figures(self, metrics: Mapping[str, float], title: str = "evaluation") -> None:
        """What the evaluation found, the figures people ask for first."""
        table = _table(title, "")
        order = [*(key for key in FIGURES if key in metrics), *sorted(metrics.keys() - FIGURES)]
        for key in order:
            label = FIGURES.get(key, key.removeprefix("eval_"))
            if key == "eval_kl" and of_few_tokens(metrics):
                label = KL_OF_FEW
            table.add_row(label, f"{metrics[key]:,.4g}")
        self._console.print(table)


def _within(runs: Sequence[tuple[int, int]], similarity: Similarity | None) -> list[str]:
    """Mean similarity of the blocks of each run to its last one."""
    if similarity is None:
        return []
    return [f"{float(similarity.values[a : b + 1, b].mean()):.3f}" for a, b in runs]


def _between(mapping: LayerMap, cross: Similarity | None) -> list[str]:
    """Similarity of each student layer to its target, with the standard error of a single one."""
    if cross is None:
        return []
    found = []
    for row in mapping.rows:
        value = sum(share * float(cross.values[row.student, t]) for t, share in row.teacher)
        single = f" ± {float(cross.errors[row.student, row.layers[0]]):.3f}"
        found.append(f"{value:.3f}{single if len(row.teacher) == 1 else ''}")
    return found


def _table(*columns: str) -> Table:
    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    return table


def _cell(value: object) -> Text:
    return Text(f"{value:,}" if isinstance(value, int) else str(value or "-"))
