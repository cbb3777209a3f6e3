"""What is asked of a server at the start, and every way in which it may be of no use."""

from collections.abc import Iterator
from typing import Any

import pytest

from llm_distill.errors import InputError
from llm_distill.loading import SAMPLE
from llm_distill.teachers import client as client_module
from llm_distill.teachers import probing
from llm_distill.teachers.client import Client
from llm_distill.teachers.dialects import SGLANG, VLLM
from llm_distill.teachers.probing import Served, check, compare, find
from tests import on_disk, tiny
from tests.teacher_server import TeacherServer


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    model = tiny.llama("teacher", vocabulary=on_disk.VOCABULARY)
    with TeacherServer(model, on_disk.tokenizer(), longest=64) as running:
        yield running


@pytest.fixture
def client(server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(probing, "HASTE", 0.4)
    made = Client(server.url, key=None, timeout=5, concurrency=2)
    yield made
    made.close()


class TestFind:
    def test_what_it_says_of_itself(self, server: TeacherServer, client: Client) -> None:
        assert find(client, "teacher", "auto") == Served(VLLM, 63)
        server.owner, server.longest = "sglang", None
        assert find(client, "teacher", "auto") == Served(SGLANG, None)
        assert find(client, "teacher", "vllm") == Served(VLLM, None)
        server.owner = "somebody"
        assert find(client, "teacher", "auto") == Served(VLLM, None)

    def test_it_may_still_be_starting(self, server: TeacherServer, client: Client) -> None:
        server.fail("/v1/models", "status", times=2, value=503)
        assert find(client, "teacher", "auto") == Served(VLLM, 63)

    def test_another_model(self, server: TeacherServer, client: Client) -> None:
        server.model = "Qwen/Qwen3-8B"
        message = r"serves Qwen/Qwen3-8B, and not 'Qwen/Qwen3-4B'; write model: Qwen/Qwen3-8B"
        with pytest.raises(InputError, match=message):
            find(client, "Qwen/Qwen3-4B", "auto")

    def test_nobody_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probing, "HASTE", 0.3)
        with TeacherServer(tiny.llama("student")) as gone:
            url = gone.url
        nobody = Client(url, key=None, timeout=5, concurrency=1)
        message = rf"{url}/v1/models: ConnectError.*; is it started\? Such as: vllm serve me/m"
        with pytest.raises(InputError, match=message):
            find(nobody, "me/m", "auto")
        nobody.close()

    def test_a_key_is_missing(self, server: TeacherServer, client: Client) -> None:
        server.key = "sk-secret"
        message = "status 401: Unauthorized; a key is read from the environment: put it into OPENAI"
        with pytest.raises(InputError, match=message):
            find(client, "teacher", "auto")

    def test_no_such_server(self, server: TeacherServer, client: Client) -> None:
        client.url = f"{server.url}/tokenizer"
        with pytest.raises(InputError, match=r"/tokenizer/v1/models: status 404: Not Found$"):
            find(client, "teacher", "auto")

    @pytest.mark.parametrize("answer", [[], {"data": None}, 3, {"models": []}])
    def test_something_else(
        self, client: Client, monkeypatch: pytest.MonkeyPatch, answer: Any
    ) -> None:
        monkeypatch.setattr(Client, "ask", lambda *_, **__: answer)
        with pytest.raises(InputError, match="this is no list of models; Remote asks servers of"):
            find(client, "teacher", "auto")


@pytest.mark.parametrize("dialect", [VLLM, SGLANG])
class TestCheck:
    def test_a_good_one(self, client: Client, dialect: Any) -> None:
        check(client, Served(dialect, 63), "teacher", 20, on_disk.VOCABULARY)

    def test_few_tokens_of_room_are_enough(
        self, server: TeacherServer, client: Client, dialect: Any
    ) -> None:
        server.longest = 4
        check(client, Served(dialect, 3), "teacher", 20, on_disk.VOCABULARY)

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            ("raw", "of no use: (a log-probability of|probabilities of a row sum to)"),
            ("low", "of no use: .* at most, which is less than 1: .*--logprobs-mode raw_logprobs"),
            ("few", "of no use: 3|of no use: 4"),
            ("none", "of no use: it has no "),
            ("other", "of no use: it (does not tell|tells) of token"),
        ],
    )
    def test_one_that_is_of_no_use(
        self, server: TeacherServer, client: Client, dialect: Any, form: str, message: str
    ) -> None:
        server.forms = {form}
        with pytest.raises(InputError, match=message) as raised:
            check(client, Served(dialect, 63), "teacher", 20, on_disk.VOCABULARY)
        assert f"{server.url}{dialect.path}: the answer" in str(raised.value)
        assert "Remote needs log-probabilities of the prompt at temperature 1" in str(raised.value)

    def test_a_smaller_vocabulary_than_ours(self, client: Client, dialect: Any) -> None:
        with pytest.raises(InputError, match=r"of no use: token \d+, and the model has 25"):
            check(client, Served(dialect, 63), "teacher", 20, 25)

    def test_one_that_is_busy_may_take_its_time(
        self, server: TeacherServer, client: Client, dialect: Any
    ) -> None:
        server.fail(dialect.path, "slow", value=1.0)  # longer than haste
        check(client, Served(dialect, 63), "teacher", 20, on_disk.VOCABULARY)

    def test_one_that_fails(self, server: TeacherServer, client: Client, dialect: Any) -> None:
        server.fail(dialect.path, "status", times=1000, value=500)
        with pytest.raises(InputError, match=f"{dialect.path}: status 500: .*; asked "):
            check(client, Served(dialect, 63), "teacher", 20, on_disk.VOCABULARY)


def test_a_limit_of_tokens(server: TeacherServer, client: Client) -> None:
    server.most = 5
    message = (
        "the server tells at most 5 tokens of a row, and top_k is 20; start it with vllm serve … "
        "--max-logprobs 20, or write top_k: 5"
    )
    with pytest.raises(InputError, match=message):
        check(client, Served(VLLM, 63), "teacher", 20, on_disk.VOCABULARY)


class TestCompare:
    def test_the_same(self, server: TeacherServer, client: Client) -> None:
        assert compare(client, "teacher", on_disk.tokenizer(), "me/t")
        assert len(server.asked("/tokenize")) == 1

    def test_another(self, client: Client) -> None:
        message = (
            r"has another tokenizer than me/t: token \d+ of .* is \d+ there and \d+ here; write of"
        )
        with pytest.raises(InputError, match=message):
            compare(client, "teacher", on_disk.foreign(), "me/t")

    def test_one_that_stops_earlier(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = on_disk.tokenizer()(SAMPLE, add_special_tokens=False).input_ids
        monkeypatch.setattr(Client, "ask", lambda *_, **__: {"tokens": ours[:-1]})
        message = rf"token {len(ours) - 1} of .* is missing there and {ours[-1]} here"
        with pytest.raises(InputError, match=message):
            compare(client, "teacher", on_disk.tokenizer(), "me/t")

    def test_a_server_that_does_not_say(self, server: TeacherServer, client: Client) -> None:
        server.tokenizer = None
        assert not compare(client, "teacher", on_disk.foreign(), "me/t")
