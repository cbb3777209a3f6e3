"""What came out of a run: times, ratios, errors and peaks of all arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.bench.arms import TOLERANCES, Kind
from scripts.bench.machine import Machine
from scripts.bench.measure import Times
from scripts.bench.peak import Peak
from scripts.bench.settings import Settings


@dataclass
class Result:
    """One arm.

    Attributes:
        name: In the table.
        kind: Of the arm.
        note: For the reader.
        times: None where it could not run.
        loss: What it computed.
        errors: Relative, of the loss and of each gradient, against the right answer.
        peak: None where it was not measured.
        missing: Why it could not run.
        returned: MiB of gradients, where they are less than all.
    """

    name: str
    kind: Kind
    note: str = ""
    times: Times | None = None
    loss: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    peak: Peak | None = None
    missing: str | None = None
    returned: float | None = None


@dataclass(frozen=True)
class Report:
    """All arms of one run, and where it ran.

    Attributes:
        benchmark: Its name.
        title: Of the table.
        settings: What was asked for.
        facts: Sizes: `gradients_mib`, and `logits_mib` where there are any.
        columns: Ratios: name -> arms whose times are summed in the denominator.
        lean: The arm whose peak the others are compared with, if any.
        machine: Where, with which versions, by which command.
        results: In the order of the table.
    """

    benchmark: str
    title: str
    settings: Settings
    facts: Mapping[str, float]
    columns: Mapping[str, Sequence[str]]
    lean: str | None
    machine: Machine
    results: Sequence[Result]

    def result(self, name: str) -> Result | None:
        """The result of an arm; None where it is not in the run."""
        return next((result for result in self.results if result.name == name), None)

    def denominator(self, column: str) -> tuple[float, float] | None:
        """Sums of minima and of medians; None where an arm of the sum did not run."""
        found = [self.result(name) for name in self.columns[column]]
        times = [result.times for result in found if result is not None and result.times]
        if len(times) < len(found):
            return None
        return sum(t.least for t in times), sum(t.middle for t in times)

    def ratios(self, result: Result) -> dict[str, tuple[float, float]]:
        """Of minima and of medians, for the columns that have a denominator."""
        found = {}
        for column in self.columns:
            below = self.denominator(column)
            if below is not None and result.times is not None:
                found[column] = (result.times.least / below[0], result.times.middle / below[1])
        return found

    def above_gradients(self, result: Result) -> float | None:
        """The peak besides the gradients that any method returns, in fp32 [N, V]."""
        if result.peak is None or result.kind == "part":
            return None
        returned = self.facts["gradients_mib"] if result.returned is None else result.returned
        spare = max(0.0, result.peak.used - returned)
        logits = self.facts.get("logits_mib")
        return spare / logits if logits else None

    def leanness(self, result: Result) -> float | None:
        """The peak over that of the lean arm."""
        lean = None if self.lean is None else self.result(self.lean)
        if lean is None or lean.peak is None or result.peak is None or not lean.peak.used:
            return None
        return result.peak.used / lean.peak.used

    def verdict(self, result: Result) -> str:
        """Whether an arm computes the same as the dense way; empty where nothing was compared."""
        if not result.errors:
            return ""
        tolerance = TOLERANCES[self.settings.dtype]
        same = all(error <= tolerance for error in result.errors.values())  # NaN is not
        return "same" if same else "different"

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "benchmark": self.benchmark,
            "title": self.title,
            "settings": self.settings.to_json(),
            "facts": dict(self.facts),
            "machine": asdict(self.machine),
            "denominators": {
                column: {"arms": list(arms), "min_and_median": self.denominator(column)}
                for column, arms in self.columns.items()
            },
            "arms": [self._row(result) for result in self.results],
        }

    def _row(self, result: Result) -> dict[str, Any]:
        """One arm, for programs."""
        times = result.times
        return asdict(result) | {
            "min": times and times.least,
            "median": times and times.middle,
            "ratios": {
                column: {"min": least, "median": middle}
                for column, (least, middle) in self.ratios(result).items()
            },
            "peak_above_gradients": self.above_gradients(result),
            "peak_over_lean": self.leanness(result),
            "verdict": self.verdict(result),
        }
