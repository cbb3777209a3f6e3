"""A Hugging Face Hub on this machine, which the real client libraries push to and pull from.

    def test_push(hub, tmp_path):
        done = run_with_hub("from huggingface_hub import HfApi; ...", hub, tmp_path)
        assert done.returncode == 0, done.stderr

The client reads `HF_ENDPOINT` when it is imported, so whatever talks to the hub runs in a process
of its own. Large files travel by LFS, or with `LocalHub(xet=folder)` by Xet: the hub then points
the client's own Xet library at an on-disk store (`local://`) and reads from its shards what
arrived. The protocol is in `hub_routes`, what is held in `hub_store`, the card in `hub_card`.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.hub_routes import ROUTES, Call
from tests.hub_store import Answer, Refusal, Store, Tree

TOKEN = "hf_" + "localtest" * 4
ROOT = Path(__file__).resolve().parents[1]


class Request(NamedTuple):
    """A request as it came in; `size` is that of its body in bytes."""

    method: str
    path: str
    size: int
    token: str


@dataclass
class Fault:
    """A failure to come."""

    method: str
    substring: str
    status: int
    times: int

    def strikes(self, request: Request) -> bool:
        """Whether this request fails; if so, one time less is left."""
        hit = self.times > 0 and self.method == request.method and self.substring in request.path
        self.times -= hit
        return hit


class LocalHub:
    """The hub: `with LocalHub() as hub`, or the fixtures `hub` and `xet_hub`.

    Args:
        user: Who the token belongs to.
        xet: A folder for the store of large files; without it they travel by LFS.
    """

    def __init__(self, *, user: str = "me", xet: Path | None = None) -> None:
        self.store = Store(user, xet)
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = self.store.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, substring: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path holds `substring` with `status`."""
        self._faults.append(Fault(method, substring, status, times))

    def files(self, repo: str, *, revision: str = "main", kind: str = "model") -> Tree:
        """The files of a repository; the `content` of what came by Xet is None."""
        return self.store.repo(kind, repo).at(revision)[1]

    def text(self, repo: str, path: str) -> str:
        """A small file of a model."""
        return (self.files(repo)[path].content or b"").decode()

    def asked(self, method: str, substring: str = "") -> list[Request]:
        """The requests so far with this method, whose path holds `substring`."""
        return [r for r in self.requests if r.method == method and substring in r.path]

    def answer(
        self, request: Request, query: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        """Record a request, fail it if that was asked for, else pass it to its route."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.strikes(request):
                    return Answer(
                        fault.status, b'{"error": "injected fault"}', {"Retry-After": "0"}
                    )
            try:
                check_token(request)
                recursive = parse_qs(query).get("recursive", ["false"])[0].lower() in ("true", "1")
                for methods, pattern, route in ROUTES:
                    found = re.fullmatch(pattern, request.path)
                    if found and request.method in methods.split():
                        return route(
                            self.store, Call(found.groupdict(), body, headers, recursive=recursive)
                        )
                raise Refusal(
                    404,
                    f"the local hub has no route {request.method} {request.path}",
                    "EntryNotFound",
                )
            except Refusal as refusal:
                return refusal.answer


def check_token(request: Request) -> None:
    """Writing, and asking who one is, need the token; presigned uploads must not carry it."""
    writes = request.method not in ("GET", "HEAD") or "write-token" in request.path
    presigned, public = request.path.startswith("/_lfs/"), request.path == "/api/validate-yaml"
    if presigned and request.token:
        raise Refusal(400, "a presigned URL takes no Authorization header")
    if (
        (writes or "whoami" in request.path)
        and not (presigned or public)
        and request.token != TOKEN
    ):
        raise Refusal(401, "Invalid credentials in Authorization header")


class Handler(BaseHTTPRequestHandler):
    """HTTP in, HTTP out."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        """The body, chunked or not."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _serve(self) -> None:
        """Ask the hub and send what it says."""
        url, body = urlsplit(self.path), self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(self.command, unquote(url.path), len(body), token)
        answer = self.hub.answer(request, url.query, body, dict(self.headers.items()))
        self.send_response(answer.status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(answer.body)),
            **answer.headers,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (http.server finds them by these names)


def environment(hub: LocalHub, home: Path, token: str = TOKEN) -> dict[str, str]:
    """The environment of a process that talks to this hub alone and keeps its cache in `home`."""
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "0" if hub.store.xet else "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    return inherited | ours


def run_with_hub(
    program: str | Sequence[str],
    hub: LocalHub,
    tmp_path: Path,
    *,
    token: str = TOKEN,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run Python code, or Python with arguments (`["-m", "llm_distill", ...]`), against the hub."""
    arguments = ["-c", program] if isinstance(program, str) else list(program)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "hf_home", token),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """An empty hub; large files travel by LFS."""
    with LocalHub() as running:
        yield running


@pytest.fixture
def xet_hub(tmp_path: Path) -> Iterator[LocalHub]:
    """An empty hub; large files travel by Xet."""
    with LocalHub(xet=tmp_path / "xet") as running:
        yield running
