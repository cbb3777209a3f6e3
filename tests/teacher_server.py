"""A server that runs a tiny model and speaks as vLLM and SGLang do, with faults on demand.

    with TeacherServer(tiny.llama("teacher"), model="t") as server:
        Remote(server.url, "t")

Forms and error texts are those of the sources that `llm_distill.teachers.dialects` names.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Received(NamedTuple):
    """A request as it came in."""

    method: str
    path: str
    body: Any
    key: str | None


@dataclass
class Fault:
    """What happens to the next requests whose path holds `path`."""

    path: str
    kind: str
    times: int
    value: Any = None
    after: int = 0


class _AnswerError(Exception):
    """A status and a body in place of the right answer."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status)
        self.status, self.body = status, body


@dataclass
class TeacherServer:
    """The server; `with` starts and stops it.

    Attributes:
        network: What it runs.
        tokenizer: For `/tokenize`; without one there is no such path.
        model: What it calls the model.
        most: `--max-logprobs` of vLLM.
        longest: `--max-model-len`.
        owner: What it calls itself.
        key: Asked for, where there is one.
        forms: What the answer is changed by: `raw` logits, `low` ones (far below 0), `few` tokens,
            `none`, `other` tokens.
        received: All requests so far.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    model: str = "teacher"
    most: int = 20
    longest: int | None = None
    owner: str = "vllm"
    key: str | None = None
    forms: set[str] = field(default_factory=set)
    received: list[Received] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.network.eval()
        self._lock, self._busy, self.at_once = threading.Lock(), 0, 0
        handler = type("BoundHandler", (Handler,), {"teacher": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(
        self, path: str, kind: str, times: int = 1, value: Any = None, *, after: int = 0
    ) -> None:
        """`drop`, `status` (value), `busy` (Retry-After), `slow` (seconds), `trickle`, `garbage`,
        `redirect` (value); so many requests later.
        """
        self.faults.append(Fault(path, kind, times, value, after))

    def asked(self, path: str) -> list[Received]:
        return [request for request in self.received if request.path == path]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts requests that are being answered, faults and all."""
        with self._lock:
            self._busy += 1
            self.at_once = max(self.at_once, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def answer(self, request: Received) -> Any:
        if self.key is not None and request.key != self.key:
            raise _AnswerError(401, {"error": "Unauthorized"})
        routes = {
            "/v1/models": self._models,
            "/v1/completions": self._completions,
            "/generate": self._generate,
            "/tokenize": self._tokenize,
        }
        if request.path not in routes:
            raise _AnswerError(404, {"detail": "Not Found"})
        return routes[request.path](request.body)

    def _models(self, body: Any) -> Any:
        assert body is None
        card = {"id": self.model, "object": "model", "owned_by": self.owner, "root": self.model}
        return {"object": "list", "data": [card | {"max_model_len": self.longest}]}

    def _tokenize(self, body: Any) -> Any:
        if self.tokenizer is None:
            raise _AnswerError(404, {"detail": "Not Found"})
        ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": list(ids.input_ids), "count": len(ids.input_ids), "max_model_len": 64}

    def _completions(self, body: Any) -> Any:
        k = body.get("prompt_logprobs")
        if body["model"] != self.model:
            said = f"The model `{body['model']}` does not exist."
            raise _AnswerError(404, {"error": {"message": said, "code": 404}})
        if k is not None and k > self.most:
            said = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            )
            raise _AnswerError(400, {"error": {"message": said, "type": "BadRequestError"}})
        assert body["max_tokens"] >= 1
        prompts: Sequence[list[int]] = body["prompt"]
        choices = []
        for index, prompt in enumerate(prompts):
            self._check_length(len(prompt) + body["max_tokens"])
            told = None if k is None or "none" in self.forms else self._vllm_rows(prompt, k)
            choices.append({"index": index, "text": " x", "prompt_logprobs": told})
        # Not in order: clients have to look at the index.
        return {"object": "text_completion", "model": self.model, "choices": choices[::-1]}

    def _vllm_rows(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        rows: list[dict[str, Any] | None] = [None]
        scores = self._scores(prompt)
        for token, row in zip(prompt[1:], scores, strict=False):
            values, ids = row.topk(3 if "few" in self.forms else k)
            top = dict(zip(ids.tolist(), values.tolist(), strict=True))
            if token not in top:
                top = {token: float(row[token])} | top
            if "other" in self.forms:
                top = {0: -50.0} | {key: value for key, value in top.items() if key != token}
            rows.append({str(t): {"logprob": v, "decoded_token": "?"} for t, v in top.items()})
        return rows

    def _generate(self, body: Any) -> Any:
        k, answers = body["top_logprobs_num"], []
        assert body["return_logprob"]
        assert body["sampling_params"]["temperature"] == 1.0
        for prompt, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            self._check_length(len(prompt) + body["sampling_params"]["max_new_tokens"])
            scores = self._scores(prompt)
            tokens: list[Any] = [[None, prompt[start], None]]
            top: list[Any] = [None]
            for place in range(start, len(prompt) - 1):
                following = prompt[place + 1]
                tokens.append([float(scores[place, following]), following, None])
                values, ids = scores[place].topk(3 if "few" in self.forms else k)
                pairs = zip(values.tolist(), ids.tolist(), strict=True)
                top.append([[value, token, None] for value, token in pairs])
            if "other" in self.forms:
                tokens = [[None, entry[1] + 1, None] for entry in tokens]
            meta = {"input_token_logprobs": tokens, "input_top_logprobs": top}
            if "none" in self.forms:
                del meta["input_top_logprobs"]
            answers.append({"text": " x", "meta_info": meta})
        return answers

    def _scores(self, prompt: list[int]) -> torch.Tensor:
        """Log-probabilities: `[T, V]`."""
        with self._lock, torch.no_grad():
            logits: torch.Tensor = self.network(input_ids=torch.tensor([prompt])).logits[0].float()
        if "low" in self.forms:
            return logits - 35.0  # of the size that GPT-2's have
        return logits if "raw" in self.forms else logits.log_softmax(-1)

    def _check_length(self, length: int) -> None:
        if self.longest is not None and length > self.longest:
            said = f"This model's maximum context length is {self.longest} tokens."
            raise _AnswerError(400, {"error": {"message": said, "code": 400}})

    def fault(self, path: str) -> Fault | None:
        """The fault that strikes a request, once less from now on."""
        with self._lock:
            for fault in self.faults:
                if fault.times <= 0 or fault.path not in path:
                    continue
                if fault.after == 0:
                    fault.times -= 1
                    return fault
                fault.after -= 1
        return None


class _QuietServer(ThreadingHTTPServer):
    """One that takes it as it is when a client hangs up."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """HTTP in, HTTP out."""

    teacher: TeacherServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        sent = self.headers.get("Authorization")
        key = None if sent is None else sent.removeprefix("Bearer ")
        body = json.loads(content) if content else None
        request = Received(self.command, path, body, key)
        self.teacher.received.append(request)
        with self.teacher.busy():
            fault = self.teacher.fault(path)
            if fault is not None and self._strike(fault, request):
                return
            try:
                answer, status = self.teacher.answer(request), 200
            except _AnswerError as error:
                answer, status = error.body, error.status
        self._send(status, answer)

    do_GET = do_POST = _serve  # noqa: N815  http.server finds them by these names

    def _strike(self, fault: Fault, request: Received) -> bool:
        """Do what a fault does; False where the request is answered all the same."""
        if fault.kind == "drop":
            self.close_connection = True
        elif fault.kind == "slow":
            time.sleep(fault.value)
            return False
        elif fault.kind == "status":
            self._send(fault.value, {"error": {"message": f"sent with {request.key}"}})
        elif fault.kind == "busy":
            self._send(429, {"message": "later"}, {"Retry-After": str(fault.value)})
        elif fault.kind == "redirect":
            self._send(307, {}, {"Location": fault.value + request.path})
        elif fault.kind == "garbage":
            self._write(200, b"{[", {})
        elif fault.kind == "trickle":
            self._trickle(fault.value)
        return True

    def _trickle(self, seconds: float) -> None:
        """A space now and then, and never an end."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass
        self.close_connection = True

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        self._write(status, json.dumps(body).encode(), headers or {})

    def _write(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
