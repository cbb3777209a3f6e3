"""Asking a server about the supervised rows of a batch."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from llm_distill.errors import InputError, ServerError
from llm_distill.keys import begins
from llm_distill.losses.sparse import TopK
from llm_distill.signals import Request, Signals
from llm_distill.teachers.client import begin, gather
from llm_distill.teachers.dialects import Asked, read
from llm_distill.teachers.probing import Served
from llm_distill.teachers.targets import top_k

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from transformers import PreTrainedModel

    from llm_distill.rows import Batch
    from llm_distill.teachers.client import Client


logger = logging.getLogger(__name__)

FIRST_BATCHES = 20
"""After so many it is told what they show."""

SLOW, THICK = 0.5, 0.1
"""Shares of the time that goes into waiting, and of the probability outside of what is told."""


@dataclass(frozen=True)
class Manner:
    """How a server is asked.

    Attributes:
        name: Of the teacher, for messages.
        model: As the server calls it.
        served: What the server says of itself.
        top_k: Tokens of each row.
        vocabulary: Tokens of the model.
        concurrency: Requests that a batch is shared out among.
        patience: Seconds in which a request is tried again.
        compared: Whether its tokenizer was found to be the one it should have.
        common: Of its tokens, how many the student has; None: all.
    """

    name: str
    model: str
    served: Served
    top_k: int
    vocabulary: int
    concurrency: int
    patience: float
    compared: bool = True
    common: int | None = None


class FirstBatches:
    """What the first batches show, told once where the user may want to change something.

    Args:
        manner: How the server is asked.
    """

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._batches = self._rows = 0
        self._start = self._waited = self._outside = 0.0

    def add(self, targets: TopK, started: float) -> None:
        """A batch that was asked for at a time, and is there now."""
        if self._batches > FIRST_BATCHES:
            return
        now = time.monotonic()
        if self._batches:  # the first waits for much else
            self._rows += len(targets)
            self._waited += now - started
            self._outside += float(targets.tail.exp().sum())
        else:
            self._start = now
        self._batches += 1
        if self._batches > FIRST_BATCHES and self._rows:
            self._tell(now - self._start)

    def _tell(self, took: float) -> None:
        """Whether it is slow, and whether it tells enough."""
        name, k, outside = self._manner.name, self._manner.top_k, self._outside / self._rows
        if self._waited > SLOW * took:
            logger.warning(
                "teacher %s tells %.0f rows a second, and %.0f %% of the first %d batches went "
                "into waiting for it; larger batches, more accumulation or a higher concurrency "
                "ask for more at once",
                name,
                self._rows / self._waited,
                100 * self._waited / took,
                FIRST_BATCHES,
            )
        if outside > THICK:
            logger.warning(
                "teacher %s: %.0f %% of its probability lies outside of the %d likeliest tokens, "
                "of which a student hears no more than that; write a larger top_k, and keep "
                "CrossEntropy beside Logits",
                name,
                100 * outside,
                k,
            )


class RemoteSource:
    """A server at work.

    Args:
        client: Closed with the source.
        manner: How it is asked.
        device: Where the targets are wanted.
    """

    def __init__(self, client: Client, manner: Manner, device: torch.device) -> None:
        self.model: PreTrainedModel | None = None
        self.device, self._manner = device, manner
        unsure = (
            "" if manner.compared else "; it does not cut texts, so its tokenizer is not checked"
        )
        aside = ""
        if manner.common is not None and manner.common < manner.vocabulary:
            aside = f"; the last {manner.vocabulary - manner.common} of its "
            aside += f"{manner.vocabulary:,} tokens, which the student does not have, put aside"
        self.told = (
            f"teacher {manner.name}: the {manner.top_k} likeliest tokens of each row, from "
            f"{manner.served.dialect.name} at {client.url}{unsure}{aside}",
        )
        self._client: Client | None = client
        self._ahead: dict[int, tuple[Batch, list[Future[TopK]]]] = {}
        self._first = FirstBatches(manner)

    def __call__(self, batch: Batch) -> Signals:
        """The likeliest tokens of the supervised rows, on the device of the training.

        Raises:
            ServerError: If the server does not answer in time, or with something else.
        """
        self._line()
        started = time.monotonic()
        ahead = id(batch) in self._ahead
        answers = self._ahead.pop(id(batch))[1] if ahead else self._begin(batch)
        targets = joined(gather(answers), self._manner.top_k)
        self._first.add(targets, started)
        return Signals(f"teacher {self._manner.name}", targets.to(self.device))

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Ask about all micro-batches of a step at once, while the student is at the first."""
        self._ahead = {id(batch): (batch, self._begin(batch)) for batch in batches}

    def ask(self, request: Request) -> None:
        """From now on give these signals only; there is one kind of them.

        Raises:
            InputError: For another kind, by name.
        """
        self._line()
        refuse(request, self._manner.name)

    def close(self) -> None:
        """Let the connections go; twice is once."""
        if self._client is not None:
            self._client.close()
        self._client, self._ahead = None, {}

    def _line(self) -> Client:
        """The client, while there is one."""
        if self._client is None:
            raise RuntimeError("this teacher was closed; open it again")
        return self._client

    def _begin(self, batch: Batch) -> list[Future[TopK]]:
        """Ask about all examples of a batch at the same time."""
        client, asked = self._line(), asked_of(batch)
        self._check_length(asked, client)
        groups = shared_out(asked, self._manner.concurrency)
        return begin([partial(self._one, group, client) for group in groups])

    def _one(self, group: Sequence[Asked], client: Client) -> TopK:
        """One request, and the rows that it is about."""
        manner, dialect = self._manner, self._manner.served.dialect
        body = dialect.body(manner.model, group, manner.top_k)
        answer = client.ask(dialect.path, body, patience=manner.patience)
        try:
            rows = [row for told in read(dialect, answer, group) for row in told]
            return top_k(rows, manner.top_k, manner.vocabulary, manner.common)
        except ValueError as error:
            where = f"{client.url}{dialect.path}"
            raise ServerError(f"{where}: the answer is of no use: {error}") from error

    def _check_length(self, asked: Sequence[Asked], client: Client) -> None:
        """Refuse what the server has no room for."""
        longest = max((len(sequence.tokens) for sequence in asked), default=0)
        most = self._manner.served.longest
        if most is not None and longest > most:
            raise InputError(
                f"a sequence of {longest:,} tokens, and {client.url} takes {most:,} and one of its "
                f"own; start it with --max-model-len {longest + 1}, or write data: {{max_length: "
                f"{most}}}"
            )


def asked_of(batch: Batch) -> list[Asked]:
    """The examples with supervised rows, in the order of the rows.

    Padding is left out, and so are the tokens after the last supervised one. An example of a pack
    is asked about alone: a server reads a prompt from its first token on.
    """
    ids, mask = batch.inputs["input_ids"].cpu(), batch.inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu() != 0
    places = batch.inputs.get("position_ids")
    starts = begins(real.numpy(), None if places is None else places.cpu())
    rows = batch.supervised
    asked = []
    for sequence, padded in enumerate(rows.host_position.split(list(rows.per_sequence))):
        tokens = ids[sequence][real[sequence]].tolist()
        supervised = (real[sequence].cumsum(0) - 1)[padded]
        for start, end in pairwise([*starts[sequence], len(tokens)]):
            own = (supervised[(supervised >= start) & (supervised < end)] - start).tolist()
            if own:  # the token after the last place may be the next example's: it only follows
                asked.append(Asked(tokens[start : start + own[-1] + 2], own))
    return asked


def joined(parts: Sequence[TopK], k: int) -> TopK:
    """Rows of several requests, one after the other, with as many tokens as the narrowest has."""
    if not parts:
        return TopK(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0))
    parts = [part.first(min(part.ids.shape[1] for part in parts)) for part in parts]
    return TopK(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.tail for part in parts]),
    )


def shared_out(asked: Sequence[Asked], most: int) -> Iterator[Sequence[Asked]]:
    """Neighbours together, in at most so many parts of even numbers of sequences.

    >>> [len(part) for part in shared_out([Asked([1, 2], [0])] * 5, 3)]
    [2, 2, 1]
    """
    parts = min(most, len(asked))
    size, larger = divmod(len(asked), parts) if parts else (0, 0)
    start = 0
    for part in range(parts):
        end = start + size + (part < larger)
        yield asked[start:end]
        start = end


def refuse(request: Request, name: str) -> None:
    """Refuse signals that do not travel.

    Raises:
        InputError: Naming kind, signal and layer.
    """
    what = ""
    if request.hidden:
        what = f"hidden state {min(request.hidden)}"
    elif request.heads:
        what = f"attention of block {min(request.heads)}"
    if what:
        raise InputError(
            f"teacher {name} is Remote, which tells the likeliest tokens of each row and nothing "
            f"else, and {what} is asked for; write Logits alone, or teacher: {{Local: …}}"
        )
