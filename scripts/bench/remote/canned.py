"""A server that knows one answer by heart, in a process of its own: it costs next to nothing."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}


@dataclass(frozen=True)
class Form:
    """What is asked and told.

    Attributes:
        dialect: `vllm` or `sglang`.
        length: Tokens of a sequence.
        k: Tokens of each row.
        vocabulary: Tokens of the model.
        seed: Of tokens and log-probabilities.
    """

    dialect: str
    length: int
    k: int
    vocabulary: int
    seed: int = 0

    def tokens(self) -> list[int]:
        """The one sequence that is ever sent."""
        found = np.random.default_rng(self.seed).integers(1, self.vocabulary - 1, self.length)
        return [int(token) for token in found]

    def told(self) -> Any:  # noqa: ANN401  any JSON
        """What is thought of it: k descending log-probabilities, and the token that came."""
        random = np.random.default_rng(self.seed + 1)
        rows: list[Any] = [None]
        for token in self.tokens()[1:]:
            ids = random.choice(self.vocabulary, self.k, replace=False).tolist()
            scores = np.sort(random.gumbel(size=self.k) - 3)[::-1]
            scores = scores - np.logaddexp.reduce(scores) - 0.1
            rows.append((token, dict(zip(ids, scores.tolist(), strict=True))))
        return self._vllm(rows) if self.dialect == "vllm" else self._sglang(rows)

    def _vllm(self, rows: list[Any]) -> Any:  # noqa: ANN401  any JSON
        def entry(score: float) -> dict[str, Any]:
            return {"logprob": score, "rank": 1, "decoded_token": " token"}

        told = [
            row and {str(t): entry(s) for t, s in ({row[0]: -12.5} | row[1]).items()}
            for row in rows
        ]
        return {"index": 0, "text": " x", "prompt_logprobs": told}

    def _sglang(self, rows: list[Any]) -> Any:  # noqa: ANN401  any JSON
        top = [row and [[s, t, None] for t, s in row[1].items()] for row in rows]
        came = [[None, self.tokens()[0], None], *([-12.5, row[0], None] for row in rows[1:])]
        return {
            "text": " x",
            "meta_info": {"input_token_logprobs": came, "input_top_logprobs": top},
        }

    def answer(self, part: bytes, sequences: int) -> bytes:
        """JSON of an answer about so many of them."""
        if self.dialect == "sglang":
            return b"[" + b",".join([part] * sequences) + b"]"
        parts = [part.replace(b'"index": 0', b'"index": %d' % n, 1) for n in range(sequences)]
        return b'{"choices": [' + b",".join(parts) + b"]}"


@contextmanager
def serving(form: Form) -> Iterator[str]:
    """The url of a server that answers in this form."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(form, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(form: Form, told: Connection) -> None:
    """Answer until the end of the process."""
    part = json.dumps(form.told()).encode()
    key = "prompt" if form.dialect == "vllm" else "input_ids"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = form.answer(part, len(asked[key]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.send(server.server_address[1])
    server.serve_forever()
