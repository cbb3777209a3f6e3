"""One piece of work, and the file that remembers the finished ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Rows = tuple[tuple[int, tuple[tuple[int, float], ...]], ...]
"""(student layer, ((teacher layer, share), ...)) of each row of a map."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process does in one go.

    Attributes:
        pair: Its letter.
        kind: Train the models of a pair; decide all maps of a seed; or train a student.
        seed: Of data order and random weights.
        mapping: Of the hint; None: no hint.
        weight: Of the hint.
        blockwise: Share of the training in which blocks learn alone.
        steps: Of the training.
        blocks: That the student is cut from, where it is.
        mode: `fixed`: the map and weight, no gate, nothing fades; `shipped`: the map, or `auto`,
            with gate and fading; `race`: `auto_race`.
    """

    pair: str
    kind: Literal["models", "maps", "run"]
    seed: int = 0
    mapping: Rows | None = None
    weight: float = 0.0
    blockwise: float = 0.0
    steps: int = 0
    blocks: str = "ends"
    mode: Literal["fixed", "shipped", "race"] = "fixed"

    @property
    def key(self) -> str:
        """The same work has the same."""
        return _key(self)


@cache  # asked for many times a second, and slow
def _key(job: Job) -> str:
    """All that a job says."""
    return json.dumps(asdict(job), sort_keys=True)


class Lines:
    """Finished jobs, one JSON line each: a file that is only appended to.

    A line that was cut short by an interruption is left out.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Line] = {}
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                self._found[line["key"]] = line

    def __len__(self) -> int:
        """Finished jobs."""
        return len(self._found)

    def get(self, job: Job) -> Line | None:
        """What a job came to; None if it is not finished."""
        return self._found.get(job.key)

    def every(self) -> list[Line]:
        """All lines."""
        return list(self._found.values())

    def add(self, job: Job, found: Mapping[str, Any]) -> None:
        """Remember a finished job."""
        line = {"key": job.key, "pair": job.pair, "kind": job.kind, "seed": job.seed, **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")
        self._found[job.key] = line


def rows_of(entries: Any) -> Rows:  # noqa: ANN401  what JSON gives
    """Rows of a map that was read."""
    return tuple(
        (int(s), tuple((int(t), float(share)) for t, share in teacher)) for s, teacher in entries
    )
