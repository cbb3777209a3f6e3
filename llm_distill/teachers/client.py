"""Speaking JSON with one server: time-outs, tries again, and errors that say what it said."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import weakref
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from llm_distill.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that may be others a little later."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds before the second try, and at most; they double in between."""

CONNECTING = 10.0
"""Seconds until a server takes the connection."""

LARGEST = 1 << 30
"""Bytes of an answer that are read: 2 M entries of a top k take about a seventh of it."""

LAST_WORDS = 1.0
"""Seconds in which requests under way may end when a client is closed."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class RefusedError(ServerError):
    """A request that the server will not answer, however often it is asked.

    Attributes:
        status: Of HTTP.
        said: The server's own words.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class _PassingError(Exception):
    """What may go away by itself; `after` is how many seconds the server asks for."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


class Client:
    """Asks one server, from any number of threads.

    Redirects are not followed, so the key goes nowhere else.

    Args:
        url: Of the server, without a path.
        key: Sent with every request; it is never part of a message.
        timeout: Seconds that an answer may take.
        concurrency: Requests at a time; others wait.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, concurrency: int) -> None:
        self.url, self._key, self._timeout = url, key, timeout
        self._concurrency = concurrency
        self._slots = threading.Semaphore(concurrency)
        self._closed = threading.Event()
        self._jitter = random.Random()  # its own: Python's is saved and resumed with a training
        self._http = httpx2.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            follow_redirects=False,
            # No proxy stands before this machine itself.
            trust_env=urlsplit(url).hostname not in LOOPBACK,
        )
        self._let_go = weakref.finalize(self, self._http.close)  # trainers do not close teachers

    def ask(
        self, path: str, body: object = None, *, patience: float, timeout: float | None = None
    ) -> Any:  # noqa: ANN401  any JSON
        """The answer to a GET, or to a POST where there is a body.

        Args:
            path: Such as `/v1/models`.
            body: As JSON.
            patience: Seconds in which it is tried again; the last try may end later.
            timeout: Seconds that an answer may take; by default the client's.

        Raises:
            RefusedError: If the server will not answer this.
            ServerError: If there is no answer in time.
        """
        with self._slots:
            started, tries = time.monotonic(), 0
            until = started + patience
            while True:
                tries += 1
                if self._closed.is_set():
                    raise ServerError(f"{self.url}{path}: the client was closed")
                try:
                    return self._once(path, body, timeout or self._timeout)
                except _PassingError as fault:
                    pause = max(fault.after, self._pause(tries))
                    late = time.monotonic() + pause >= until
                    if late or self._closed.wait(pause):
                        took = time.monotonic() - started
                        raise ServerError(self._failure(path, fault, tries, took)) from fault

    def close(self) -> None:
        """Let connections go; whoever waits to try again gives up, and who is answered may end."""
        if self._closed.is_set():
            return
        self._closed.set()
        end = time.monotonic() + LAST_WORDS
        for _ in range(self._concurrency):
            self._slots.acquire(timeout=max(end - time.monotonic(), 0.0))
        self._let_go()

    def _once(self, path: str, body: object, timeout: float) -> Any:  # noqa: ANN401  any JSON
        """One try.

        Raises:
            _PassingError: If another one may do.
            RefusedError: If none will.
        """
        try:
            content = self._read(path, body, timeout)
        except httpx2.ConnectTimeout as error:
            raise _PassingError("nobody answers") from error
        except httpx2.TimeoutException as error:
            raise _PassingError(f"no answer within {timeout:g} s") from error
        except httpx2.RequestError as error:
            said = f"{type(error).__name__}: {self._masked(str(error))}"
            # An error about what was sent quotes it, in a traceback too.
            quotes = isinstance(error, httpx2.LocalProtocolError)
            raise _PassingError(said) from (None if quotes else error)
        try:
            return json.loads(content)
        except ValueError as error:
            raise _PassingError(f"the answer is no JSON: {self._quoted(content)}") from error

    def _read(self, path: str, body: object, timeout: float) -> bytes:
        """The body of a good answer."""
        method, until = "GET" if body is None else "POST", time.monotonic() + timeout
        limits = httpx2.Timeout(timeout, connect=min(timeout, CONNECTING))
        with self._http.stream(method, self.url + path, json=body, timeout=limits) as response:
            parts, size = [], 0
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > until:
                    raise _PassingError(f"no whole answer within {timeout:g} s")
                if size > LARGEST:
                    raise RefusedError(
                        f"{self.url}{path}: the answer is longer than {LARGEST:,} bytes; write a "
                        "smaller top_k, or give shorter sequences",
                        response.status_code,
                        "",
                    )
        content = b"".join(parts)
        if response.status_code != 200:
            raise self._complaint(path, response, content)
        return content

    def _complaint(self, path: str, response: httpx2.Response, content: bytes) -> Exception:
        """What to raise for an answer that is none."""
        status, said = response.status_code, self._quoted(content)
        if status in PASSING:
            return _PassingError(f"status {status}: {said}", _retry_after(response))
        if response.is_redirect:
            said = f"it redirects to {response.headers.get('location', 'nowhere')}; write that url"
        return RefusedError(f"{self.url}{path}: status {status}: {said}", status, said)

    def _quoted(self, content: bytes) -> str:
        """What a server said, in one short line and without the key."""
        text = content[:4096].decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            text = _message(json.loads(content))
        text = " ".join(self._masked(text).split())
        return text[:300] or "(nothing)"

    def _masked(self, text: str) -> str:
        """A text without the key, as it is or as Python shows it."""
        if not self._key:
            return text
        return text.replace(self._key, "[key]").replace(repr(self._key)[1:-1], "[key]")

    def _pause(self, tries: int) -> float:
        """Seconds before the next try: they double, and no two clients wait alike."""
        longest = min(FIRST_PAUSE * 2.0 ** (tries - 1), LONGEST_PAUSE)
        return longest * self._jitter.uniform(0.5, 1.0)

    def _failure(self, path: str, fault: _PassingError, tries: int, took: float) -> str:
        """Where, what, how often and how long; why it ended, where that is not plain."""
        times = "once" if tries == 1 else f"{tries} times"
        told = f"{self.url}{path}: {fault}; asked {times} in {took:.1f} s"
        if fault.after:
            told += f", and it wants to be left alone for {fault.after:.0f} s"
        return told


def begin(jobs: Sequence[Callable[[], T]]) -> list[Future[T]]:
    """Do jobs at the same time.

    In threads that nobody waits for when Python ends: a request may hang for minutes.
    """
    futures: list[Future[T]] = [Future() for _ in jobs]
    for job, future in zip(jobs, futures, strict=True):
        threading.Thread(target=_fulfil, args=(job, future), daemon=True).start()
    return futures


def gather(futures: Sequence[Future[T]]) -> list[T]:
    """What jobs returned; the first error of any of them ends the wait.

    >>> gather(begin([lambda: 1, lambda: 2]))
    [1, 2]
    """
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        if (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]


def _fulfil(job: Callable[[], T], future: Future[T]) -> None:
    """Do a job, and hand over what came of it."""
    try:
        future.set_result(job())
    except BaseException as error:  # it is raised where the result is asked for
        future.set_exception(error)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that a server asks to be left alone; 0 where it does not say.

    Dates are not read: vLLM, SGLang and their proxies give seconds.
    """
    try:
        return max(float(response.headers.get("retry-after", 0)), 0.0)
    except ValueError:
        return 0.0


def _message(content: Any) -> str:  # noqa: ANN401  any JSON
    """The words in an error: `error.message` of OpenAI, `message` or `detail` of others."""
    found = content
    while isinstance(found, dict):
        found = next((found[k] for k in ("error", "message", "detail") if k in found), str(found))
    return str(found)
