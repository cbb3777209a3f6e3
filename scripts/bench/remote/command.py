"""The command line of `python -m scripts.bench remote`. It imports torch when it has to run."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from scripts.bench.remote.canned import PATHS, Form, serving

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from llm_distill.rows import Batch
    from llm_distill.teachers.asking import Manner
    from llm_distill.teachers.client import Client


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--sequences", type=int, default=16, help="of a batch (default 16)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default 1024)")
    parser.add_argument("--k", type=int, nargs="+", default=[20, 64], help="tokens of each row")
    parser.add_argument("--vocab", type=int, default=151_936, help="tokens of the model")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=5, help="timed, after an untimed one")


@dataclass(frozen=True)
class Measured:
    """What a batch cost, in medians.

    Attributes:
        dialect: `vllm` or `sglang`.
        k: Tokens of each row.
        megabytes: Of JSON.
        bare: Seconds to ask, receive and parse, and look at nothing.
        ours: Seconds of the teacher.
        rows: That came of it.
    """

    dialect: str
    k: int
    megabytes: float
    bare: float
    ours: float
    rows: int


def execute(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure, and print a table."""
    del argv
    from rich.console import Console
    from rich.table import Table

    names = ("dialect", "k", "MB", "bare ms", "teacher ms", "x bare", "rows/s", "µs/row")
    table = Table(*names, title=f"{options.sequences} sequences of {options.length} tokens")
    for dialect in PATHS:
        for k in options.k:
            found = measure(options, Form(dialect, options.length, k, options.vocab))
            figures = (
                f"{found.megabytes:.1f}",
                f"{1e3 * found.bare:.0f}",
                f"{1e3 * found.ours:.0f}",
                f"{found.ours / found.bare:.2f}",
                f"{found.rows / found.ours:,.0f}",
                f"{1e6 * found.ours / found.rows:.1f}",
            )
            table.add_row(dialect, str(k), *figures)
    Console(highlight=False).print(table)
    return 0


def measure(options: argparse.Namespace, form: Form) -> Measured:
    """One form of answers, from a server that is a process of its own."""
    import torch

    from llm_distill.teachers.asking import Manner, RemoteSource
    from llm_distill.teachers.client import Client
    from llm_distill.teachers.dialects import DIALECTS
    from llm_distill.teachers.probing import Served

    manner = Manner(
        name="canned",
        model="canned",
        served=Served(DIALECTS[form.dialect], None),
        top_k=form.k,
        vocabulary=form.vocabulary,
        concurrency=options.concurrency,
        patience=60,
    )
    batch = _batch(form, options.sequences)
    with serving(form) as url:
        client = Client(url, key=None, timeout=300, concurrency=options.concurrency)
        source = RemoteSource(client, manner, torch.device("cpu"))
        bare = _median(lambda: _bare(client, manner, batch), options.rounds)
        ours = _median(lambda: source(batch), options.rounds)
        source.close()
    megabytes = options.sequences * len(json.dumps(form.told())) / 1e6
    return Measured(form.dialect, form.k, megabytes, bare, ours, len(batch.supervised))


def _batch(form: Form, sequences: int) -> Batch:
    """The one sequence, again and again, every token supervised."""
    import torch

    from llm_distill.rows import Batch, supervised_rows

    ids = torch.tensor([form.tokens()] * sequences)
    return Batch({"input_ids": ids}, supervised_rows(ids, None, ids, shift=True))


def _bare(client: Client, manner: Manner, batch: Batch) -> None:
    """Ask as the teacher does, and look at nothing."""
    from llm_distill.teachers.asking import asked_of, shared_out
    from llm_distill.teachers.client import begin, gather

    dialect = manner.served.dialect
    jobs = [
        partial(
            client.ask, dialect.path, dialect.body(manner.model, group, manner.top_k), patience=60
        )
        for group in shared_out(asked_of(batch), manner.concurrency)
    ]
    gather(begin(jobs))


def _median(job: Callable[[], object], rounds: int) -> float:
    """Seconds, after an untimed round."""
    job()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
