"""`cache`: bytes, fidelity and reading speed of cached teachers, one thread."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from llm_distill.cache.encoded import Encoded, Fidelity
    from llm_distill.cache.estimator import Estimator

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADS = (
    "kept",
    "bytes a token",
    "KL, mean",
    "KL, max",
    "read, M tokens/s",
    "read and decoded",
    "the same, shuffled",
)
ABOUT = (
    "A token is a supervised one. Logits of a row: -s log(rank) + N(0, 1), s from U(0.6, 2.6); "
    "which token has which rank is drawn anew for each row, the worst case for ids",
    "KL: nats between what is kept exactly and what is read back; draws and hidden states lose "
    "nothing",
    "read: Parquet to bytes, zstd, page checksums verified; decoded: to the tensors a loss takes; "
    "shuffled: single examples in random order, found by their keys. CPU seconds, one thread, best "
    "of the rounds",
    "dense logits: the same rows, KL of all tokens",
    "DistillKit: not in this run; its codec by itself (commit a61c2e7), at 128,256 tokens, on "
    "Gaussian logits and on such that fall as rank^-1.5 and rank^-2.5, least and most of three; "
    "KL of the stored tokens alone, as it keeps no tail. Budget: top 50, recommended: top 128",
)
ELSEWHERE = (
    ("DistillKit, budget", "121", "7e-3 to 2e-2", "-", "-", "-", "-"),
    ("DistillKit, recommended", "328", "3e-3 to 1.8e-1", "-", "-", "-", "-"),
)


@dataclass(frozen=True)
class Line:
    """One kind of target.

    Attributes:
        name: In words.
        size: Bytes of a token.
        told: Means of what was measured when it was encoded.
        speeds: Tokens a second: read, read and decoded, the same shuffled.
    """

    name: str
    size: float
    told: dict[str, float]
    speeds: tuple[float, float, float]

    def cells(self) -> tuple[str, ...]:
        """As text."""
        speeds = (f"{speed / 1e6:.2f}" for speed in self.speeds)
        return (
            self.name,
            f"{self.size:.1f}",
            f"{self.told['kl']:.1e}",
            f"{self.told['worst']:.1e}",
            *speeds,
        )


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--vocab", type=int, default=128_256, help="tokens (default 128256)")
    parser.add_argument("--length", type=int, default=1024, help="rows of an example")
    parser.add_argument("--examples", type=int, default=4, help="different ones (default 4)")
    parser.add_argument("--repeats", type=int, default=8, help="of each in the file (default 8)")
    parser.add_argument("--width", type=int, default=4096, help="of hidden states (default 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="timed, after an untimed one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, nargs="?", const=RESULTS, help="append here")


def execute(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Encode, write, read; print and write the table."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    from rich.console import Console

    from scripts.bench import states
    from scripts.bench.machine import Machine
    from scripts.bench.settings import HeadSettings
    from scripts.bench.table import append, facts, section

    told = Console(stderr=True, highlight=False)
    machine = Machine.here(HeadSettings(), argv)
    tell = partial(told.print, style="dim")
    lines = measure(options, tell)
    rows = [*(line.cells() for line in lines), dense(options), *ELSEWHERE]
    title = (
        f"cache: {options.vocab:,} tokens, {options.examples * options.repeats} examples of "
        f"{options.length:,} rows, hidden states of {options.width:,}"
    )
    layers = f"cache: hidden states of a layer of {options.width:,} features"
    tables = (
        (title, HEADS, rows, ABOUT),
        (layers, states.HEADS, states.measure(options, tell), states.ABOUT),
    )
    for name, heads, cells, about in tables:
        _show(name, heads, cells, (*about, *facts(machine)))
        if options.markdown is not None:
            made = section(
                name, _markdown(heads, cells), [*about, *facts(machine)], machine.command
            )
            append(options.markdown, made)
    return 0


def measure(options: argparse.Namespace, tell: Callable[[str], object]) -> list[Line]:
    """Every kind of target on the same rows."""
    import torch

    from llm_distill.cache import estimators
    from llm_distill.cache.estimator import Given
    from llm_distill.signals import Dense, Factored, Head

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tell(f"logits of {options.examples * options.length:,} rows")
    k = min(50, options.vocab - 1)
    kinds = {
        estimators.topk(k=k): None,
        estimators.topk(k=min(64, options.vocab - 1)): None,
        estimators.sampled(n=50): None,
        estimators.hybrid(m=min(8, k), n=42): None,
        estimators.hidden(): Head(torch.randn(64, options.width).bfloat16()),
    }
    encoded: dict[Estimator, list[tuple[Encoded, Fidelity]]] = {kind: [] for kind in kinds}
    for example in range(options.examples):
        logits = rows(options.length, options.vocab)
        states = torch.randn(options.length, options.width).bfloat16()
        labels = torch.zeros(options.length, dtype=torch.long)
        for kind, head in kinds.items():
            said = Dense(logits) if head is None else Factored(states, head)
            vocabulary = options.vocab if head is None else 64
            tell(f"{kind}: example {example + 1}")
            encoded[kind].append(kind.encode(Given(said, labels, vocabulary, example)))
    with tempfile.TemporaryDirectory() as folder:
        return [
            line(kind, found, kinds[kind], Path(folder), options) for kind, found in encoded.items()
        ]


def dense(options: argparse.Namespace) -> tuple[str, ...]:
    """A row of the table: all logits of the first example, rounded to bf16."""
    import torch

    from llm_distill.losses import forward_kl

    torch.manual_seed(options.seed)
    logits = rows(options.length, options.vocab)
    parts = logits.split(64)
    lost = torch.cat([forward_kl(part.bfloat16().float(), part.double()) for part in parts])
    size = f"{2 * options.vocab:,}"
    return "dense logits, bf16", size, f"{lost.mean():.1e}", f"{lost.max():.1e}", "-", "-", "-"


def rows(count: int, vocabulary: int) -> Tensor:
    """Logits that fall as a power of the rank, of another steepness and order in each row."""
    import torch

    steep = torch.rand(count, 1) * 2 + 0.6
    ranked = -steep * torch.arange(1, vocabulary + 1).log() + torch.randn(count, vocabulary)
    for row in ranked:
        row.copy_(row[torch.randperm(vocabulary)])
    return ranked


@dataclass(frozen=True)
class Written:
    """A shard of one kind.

    Attributes:
        path: Of the file.
        kind: Of its targets.
        head: Of hidden states.
        rows: All of them.
    """

    path: Path
    kind: Any
    head: Any
    rows: int

    def read(self, *, decode: bool) -> None:
        """All groups in their order."""
        reader = self._open()
        for group in range(reader.file.num_row_groups):
            for example in reader.read(group).examples:
                if decode:
                    self.kind.decode([example], self.head)

    def look_up(self, index: Any, order: Sequence[bytes]) -> None:  # noqa: ANN401  an Index
        """Single examples, each with its row group."""
        reader = self._open()
        for place in index.find(order):
            self.kind.decode([reader.read(place.group).examples[place.row]], self.head)

    def speed(self, run: Callable[[], None], rounds: int) -> float:
        """Rows a second."""
        times = []
        for _ in range(rounds + 1):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return self.rows / min(times[1:])

    def _open(self) -> Any:  # noqa: ANN401  a ShardReader, not imported before --help
        from llm_distill.cache.shards import ShardReader

        return ShardReader.open(self.path, self.kind.columns)


def line(
    kind: Estimator,
    found: Sequence[tuple[Encoded, Fidelity]],
    head: object,
    folder: Path,
    options: argparse.Namespace,
) -> Line:
    """Write a shard of one kind, and read it in three ways."""
    from llm_distill.cache.encoded import Fidelity
    from llm_distill.cache.index import Index, Place
    from llm_distill.cache.shards import ShardWriter

    path = folder / f"{kind.name}.parquet"
    keys = [k.to_bytes(16, "big") for k in range(len(found) * options.repeats)]
    with ShardWriter(path, kind.columns) as writer:
        for k, key in enumerate(keys):
            writer.add(key, found[k % len(found)][0])
    written = Written(path, kind, head, writer.rows)
    index = Index.of(keys, [Place(0, *place) for place in writer.places])
    order = random.Random(options.seed).sample(keys, len(keys))
    runs = (
        partial(written.read, decode=False),
        partial(written.read, decode=True),
        partial(written.look_up, index, order),
    )
    read, decoded, shuffled = (written.speed(run, options.rounds) for run in runs)
    told = sum((fidelity for _, fidelity in found), start=Fidelity()).means()
    return Line(str(kind), path.stat().st_size / writer.rows, told, (read, decoded, shuffled))


def _show(
    title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]], about: Sequence[str]
) -> None:
    """For the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, title_justify="left")
    for cells in rows:
        table.add_row(*cells)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table, *about, sep="\n")


def _markdown(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The table, its figures to the right."""
    return [
        f"| {' | '.join(heads)} |",
        f"| --- |{' ---: |' * (len(heads) - 1)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
