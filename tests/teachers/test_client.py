"""The client: what it tries again, when it gives up, what it says, and where the key goes."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_distill.errors import ServerError
from llm_distill.teachers import client as module
from llm_distill.teachers.client import Client, RefusedError, begin, gather
from tests import tiny
from tests.teacher_server import TeacherServer

MODELS = "/v1/models"
SECRET = "sk-very-secret"


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with TeacherServer(tiny.llama("student")) as running:
        yield running


@pytest.fixture
def connect(server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the server; it pauses for hundredths of a second."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.02)
    made: list[Client] = []

    def make(**changes: Any) -> Client:
        given: dict[str, Any] = {"key": None, "timeout": 5.0, "concurrency": 4}
        made.append(Client(given.pop("url", server.url), **given | changes))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_an_answer(server: TeacherServer, connect: Callable[..., Client]) -> None:
    answer = connect().ask(MODELS, patience=1)
    assert answer["data"][0]["id"] == "teacher"
    assert [(r.method, r.body, r.key) for r in server.received] == [("GET", None, None)]


@pytest.mark.parametrize(
    ("kind", "value"),
    [("drop", None), ("status", 500), ("status", 503), ("busy", 0), ("garbage", None)],
)
def test_what_passes_is_tried_again(
    server: TeacherServer, connect: Callable[..., Client], kind: str, value: Any
) -> None:
    server.fail(MODELS, kind, times=3, value=value)
    assert connect().ask(MODELS, patience=10)["object"] == "list"
    assert len(server.received) == 4


def test_the_server_says_when(server: TeacherServer, connect: Callable[..., Client]) -> None:
    server.fail(MODELS, "busy", value=0.4)
    start = time.monotonic()
    connect().ask(MODELS, patience=10)
    assert time.monotonic() - start >= 0.4


def test_a_server_that_wants_longer_than_we_wait_is_given_up_at_once(
    server: TeacherServer, connect: Callable[..., Client]
) -> None:
    server.fail(MODELS, "busy", value=600)
    with pytest.raises(
        ServerError, match=r"status 429: later; asked once in .* left alone for 600"
    ):
        connect().ask(MODELS, patience=5)
    assert len(server.received) == 1


def test_in_the_end_it_says_where_what_and_how_often(
    server: TeacherServer, connect: Callable[..., Client]
) -> None:
    server.fail(MODELS, "status", times=1000, value=500)
    client = connect(key=SECRET)
    with pytest.raises(ServerError) as raised:
        client.ask(MODELS, patience=0.5)
    said = str(raised.value)
    assert said.startswith(f"{server.url}{MODELS}: status 500: sent with [key]; asked ")
    assert f"asked {len(server.received)} times in 0." in said
    assert len(server.received) > 2
    assert server.received[0].key == SECRET
    assert SECRET not in said


def test_a_key_that_cannot_be_sent_is_not_repeated(connect: Callable[..., Client]) -> None:
    """The error quotes the header; nor is it in the traceback."""
    client = connect(key=f"sk-{1234}\n{SECRET}")
    with pytest.raises(ServerError, match=r"LocalProtocolError: .*\[key\]") as raised:
        client.ask(MODELS, patience=0.1)
    shown = "".join(traceback.format_exception(raised.value))
    assert "LocalProtocolError" in shown
    assert SECRET not in shown
    assert "1234\\n" not in shown


def test_nobody_there(connect: Callable[..., Client]) -> None:
    with TeacherServer(tiny.llama("student")) as gone:
        url = gone.url
    client = Client(url, key=None, timeout=5, concurrency=1)
    with pytest.raises(ServerError, match=rf"{url}/v1/models: ConnectError: .*refused; asked \d+"):
        client.ask(MODELS, patience=0.3)
    client.close()


@pytest.mark.parametrize("kind", ["slow", "trickle"])
def test_a_slow_answer_is_none(
    server: TeacherServer, connect: Callable[..., Client], kind: str
) -> None:
    server.fail(MODELS, kind, times=1, value=1.0)
    client = connect(timeout=0.2)
    assert client.ask(MODELS, patience=10)["object"] == "list"
    server.fail(MODELS, kind, times=1000, value=1.0)
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"no (whole )?answer within 0\.2 s; asked \d times"):
        client.ask(MODELS, patience=0.6)
    assert time.monotonic() - start < 2


def test_no_try_begins_after_the_deadline(
    server: TeacherServer, connect: Callable[..., Client]
) -> None:
    server.fail(MODELS, "slow", times=1000, value=1.0)
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer within 0\.5 s; asked once in"):
        connect(timeout=60).ask(MODELS, patience=0.3, timeout=0.5)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final(
    server: TeacherServer, connect: Callable[..., Client], status: int
) -> None:
    server.fail(MODELS, "status", value=status)
    with pytest.raises(RefusedError, match=f"{MODELS}: status {status}: sent with None") as raised:
        connect().ask(MODELS, patience=10)
    assert (raised.value.status, raised.value.said) == (status, "sent with None")
    assert len(server.received) == 1


def test_the_key_follows_no_redirect(server: TeacherServer, connect: Callable[..., Client]) -> None:
    with TeacherServer(tiny.llama("student")) as other:
        server.fail(MODELS, "redirect", value=other.url)
        with pytest.raises(
            RefusedError, match=f"status 307: it redirects to {other.url}/v1/models; write that url"
        ):
            connect(key=SECRET).ask(MODELS, patience=1)
        assert other.received == []


def test_an_answer_that_is_too_long_is_refused(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 10)
    with pytest.raises(RefusedError, match="the answer is longer than 10 bytes; write a smaller"):
        connect().ask(MODELS, patience=1)


def test_no_more_at_a_time_than_allowed(
    server: TeacherServer, connect: Callable[..., Client]
) -> None:
    server.fail(MODELS, "slow", times=12, value=0.05)
    client = connect(concurrency=3)
    gather(begin([lambda: client.ask(MODELS, patience=5)] * 12))
    assert len(server.received) == 12
    assert server.at_once <= 3


def test_closing_ends_the_waiting(server: TeacherServer, connect: Callable[..., Client]) -> None:
    server.fail(MODELS, "busy", times=1000, value=60)
    client = connect()
    threading.Timer(0.2, client.close).start()
    with pytest.raises(ServerError, match="status 429"):
        client.ask(MODELS, patience=1000)


def test_pauses_double_and_are_no_ones_elses(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.25)
    client = connect()
    for tries, longest in ((1, 0.25), (2, 0.5), (4, 2.0), (8, 30.0), (900, 30.0)):
        pauses = [client._pause(tries) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


class TestGather:
    def test_all_run_at_once_and_in_order(self) -> None:
        gate = threading.Barrier(5, timeout=5)
        jobs = [lambda k=k: (gate.wait(), k)[1] for k in range(5)]
        assert gather(begin(jobs)) == list(range(5))
        assert gather(begin([])) == []

    def test_the_first_error_ends_the_wait(self) -> None:
        end = threading.Event()

        def fail() -> bool:
            raise ServerError("broken")

        with pytest.raises(ServerError, match="broken"):
            gather(begin([lambda: end.wait(20), fail]))
        end.set()
