"""What a source sends of a batch, and that what comes back are the model's own rows."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, PreTrainedModel

from llm_distill.binding import make_batch
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError, ServerError
from llm_distill.losses.sparse import TopK
from llm_distill.rows import Batch
from llm_distill.signals import Request
from llm_distill.teachers import client as client_module
from llm_distill.teachers.asking import (
    FIRST_BATCHES,
    FirstBatches,
    Manner,
    RemoteSource,
    asked_of,
    shared_out,
)
from llm_distill.teachers.client import Client
from llm_distill.teachers.dialects import DIALECTS, Asked
from llm_distill.teachers.probing import Served
from tests import tiny
from tests.teacher_server import TeacherServer

CPU = torch.device("cpu")
K = 8


@pytest.fixture
def server(teacher: PreTrainedModel) -> Iterator[TeacherServer]:
    with TeacherServer(teacher) as running:
        yield running


@pytest.fixture(params=list(DIALECTS))
def source(
    server: TeacherServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteSource]:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.02)
    served = Served(DIALECTS[request.param], 63)
    client = Client(server.url, key=None, timeout=5, concurrency=4)
    manner = Manner("me/t", "teacher", served, K, tiny.VOCABULARY, concurrency=4, patience=0.5)
    made = RemoteSource(client, manner, CPU)
    yield made
    made.close()


def collated(inner: Callable[[Any], Any] | None = None, rows: Any = None) -> Batch:
    collate = RowCollator(inner or Collator(pad_token_id=0), shift=True, valid=False)
    examples = [tiny.rows(empty=(1,))[k] for k in range(6)] if rows is None else rows
    return make_batch(collate(examples), None, seed=0, epoch=0)


def padded(side: str) -> Batch:
    """Whole sequences of 12, 10 and 8 tokens, every token supervised."""
    return collated(lambda _: tiny.batch(side=side), rows=[0])


def expected(model: PreTrainedModel, batch: Batch) -> TopK:
    with torch.no_grad():
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.supervised.index]
    return TopK.of(logits.double(), K)


def prompts(server: TeacherServer) -> list[list[int]]:
    return [
        prompt
        for request in server.received
        for prompt in request.body.get("prompt", request.body.get("input_ids"))
    ]


@pytest.mark.parametrize("made", [collated, lambda: padded("right"), lambda: padded("left")])
def test_the_rows_are_the_models_own(
    source: RemoteSource, teacher: PreTrainedModel, made: Callable[[], Batch]
) -> None:
    batch = made()
    found, wanted = source(batch).logits, expected(teacher, batch)
    assert isinstance(found, TopK)
    assert len(found) == len(batch.supervised) > 10
    assert torch.equal(found.ids, wanted.ids)
    assert (found.log_probs - wanted.log_probs).abs().max() < 1e-5
    assert (found.tail.exp() - wanted.tail.exp()).abs().max() < 1e-6


@pytest.mark.parametrize("side", ["right", "left"])
def test_no_padding_is_sent(source: RemoteSource, server: TeacherServer, side: str) -> None:
    batch = padded(side)
    source(batch)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    real = [row[keep != 0].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert sorted(prompts(server)) == sorted(real)
    assert sorted(map(len, real)) == [8, 10, 12]


def test_nothing_is_sent_that_no_row_needs(source: RemoteSource, server: TeacherServer) -> None:
    """No sequence without rows, and no tokens after the last one that is supervised."""
    labels = [[-100, 4, 5, -100, -100], [-100] * 5, [-100, -100, -100, -100, 9]]
    ids = [[3, 4, 5, 6, 7], [8] * 5, [5, 6, 7, 8, 9]]
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    batch = collated(rows=rows)
    assert len(source(batch).logits) == 3
    assert sorted(prompts(server)) == [[3, 4, 5], [5, 6, 7, 8, 9]]


def packed(rows: Any = None) -> Batch:
    return collated(DataCollatorWithFlattening(), rows)


def test_a_pack_is_asked_about_example_by_example(
    source: RemoteSource, server: TeacherServer, teacher: PreTrainedModel
) -> None:
    """What stands before an example in a pack is nothing that it follows."""
    flat, apart = packed(), collated()
    assert len(flat.inputs["input_ids"]) == 1
    found, wanted = source(flat).logits, expected(teacher, apart)
    assert isinstance(found, TopK)
    assert torch.equal(found.ids, wanted.ids)
    assert (found.log_probs - wanted.log_probs).abs().max() < 1e-5
    assert asked_of(flat) == asked_of(apart)
    assert len(prompts(server)) == 5


def test_a_pack_may_be_longer_than_the_server_takes(source: RemoteSource) -> None:
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (40, 50)]
    assert len(source(packed(rows)).logits) == 39 + 49
    long = {"input_ids": list(range(3, 67)), "labels": list(range(3, 67))}
    with pytest.raises(InputError, match=r"a sequence of 64 tokens, and .* takes 63"):
        source(packed([*rows, long]))


def test_a_pack_whose_examples_supervise_their_first_token() -> None:
    """The last token of one then predicts the first of the next; its teacher reads the one."""
    ids, places = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    batch = collated(lambda _: {"input_ids": ids, "position_ids": places, "labels": ids}, rows=[0])
    assert asked_of(batch) == [Asked([5, 6, 7], [0, 1]), Asked([7, 8], [0])]


def test_no_rows(source: RemoteSource, server: TeacherServer) -> None:
    batch = collated(rows=[{"input_ids": [3, 4, 5], "labels": [-100] * 3}])
    found = source(batch).logits
    assert isinstance(found, TopK)
    assert found.ids.shape == (0, K)
    assert server.received == []


def test_a_batch_is_asked_at_once(source: RemoteSource, server: TeacherServer) -> None:
    server.fail("/", "slow", times=100, value=0.2)
    source(collated())
    assert len(server.received) == 4  # five sequences have rows
    assert server.at_once > 1
    assert len(prompts(server)) == 5


def test_a_step_is_asked_for_once_and_before(
    source: RemoteSource, server: TeacherServer, teacher: PreTrainedModel
) -> None:
    batches = [collated(), padded("right"), padded("left")]
    source.prepare(batches)
    deadline = time.monotonic() + 10
    while len(prompts(server)) < 5 + 3 + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    sent = len(server.received)
    for batch in batches:
        found = source(batch).logits
        assert isinstance(found, TopK)
        assert torch.equal(found.ids, expected(teacher, batch).ids)
    assert len(server.received) == sent
    source(batches[0])  # what comes unexpectedly, as in an evaluation, is asked for then
    assert len(server.received) == sent + 4


def test_what_the_student_does_not_have_is_put_aside(
    source: RemoteSource, server: TeacherServer, teacher: PreTrainedModel
) -> None:
    """Some of the likeliest tokens are padding: as many stay as the poorest row has left."""
    common, batch = tiny.VOCABULARY - 8, collated()
    source._manner = replace(source._manner, common=common)
    found, whole = source(batch).logits, expected(teacher, batch)
    assert isinstance(found, TopK)
    fewest = int((whole.ids < common).sum(1).min())
    assert found.ids.shape == (len(whole), fewest)
    assert 0 < fewest < K
    with torch.no_grad():
        logits = teacher(**batch.inputs).logits.flatten(0, 1)[batch.supervised.index, :common]
    assert torch.equal(found.ids, TopK.of(logits, fewest).ids)
    assert found.ids.max() < common
    assert torch.allclose(found.targets().exp().sum(-1), torch.ones(len(found)))


def test_it_says_what_it_is(source: RemoteSource, server: TeacherServer) -> None:
    (told,) = source.told
    assert told.startswith("teacher me/t: the 8 likeliest tokens of each row, from ")
    assert told.endswith(f" at {server.url}")


class TestFirstBatches:
    def told(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        assert all(record.levelname == "WARNING" for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    def manner(self, source: RemoteSource) -> Manner:
        return source._manner

    def test_a_slow_server_is_told_once(
        self, source: RemoteSource, server: TeacherServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.fail("/", "slow", times=1000, value=0.01)
        batch = collated()
        for _ in range(FIRST_BATCHES + 5):
            source(batch)
        slow, thick = self.told(caplog)
        assert re.match(r"teacher me/t tells \d+ rows a second, and \d+ % of the first 20 ", slow)
        found = source(batch).logits
        assert isinstance(found, TopK)
        outside = 100 * float(found.tail.exp().mean())
        assert outside > 10
        assert thick.startswith(f"teacher me/t: {outside:.0f} % of its probability lies outside of")
        assert "the 8 likeliest tokens" in thick

    @pytest.mark.parametrize("outside", [0.05, 0.2])
    def test_a_quick_one_is_told_only_where_it_tells_little(
        self, source: RemoteSource, caplog: pytest.LogCaptureFixture, outside: float
    ) -> None:
        first = FirstBatches(self.manner(source))
        few = torch.full((100, 1), 1 - outside).log()
        targets = TopK(
            torch.zeros(100, 1, dtype=torch.int64), few, torch.full((100,), outside).log()
        )
        for _ in range(FIRST_BATCHES + 5):
            first.add(targets, time.monotonic())
            time.sleep(0.002)
        assert [line[:20] for line in self.told(caplog)] == ["teacher me/t: 20 % o"] * (
            outside > 0.1
        )


def test_faults_that_pass_are_not_seen(
    source: RemoteSource, server: TeacherServer, teacher: PreTrainedModel
) -> None:
    server.fail("/", "drop", times=2)
    server.fail("/", "status", times=2, value=500)
    server.fail("/", "busy", times=1, value=0)
    found = source(batch := collated()).logits
    assert isinstance(found, TopK)
    assert torch.equal(found.ids, expected(teacher, batch).ids)
    assert len(server.received) == 4 + 5


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("status", 500, "status 500: .*; asked .* times in"),
        ("drop", None, "RemoteProtocolError: .*; asked .* times in"),
        ("garbage", None, r"the answer is no JSON: \{\["),
        ("status", 400, "status 400: "),
    ],
)
def test_a_server_that_breaks(
    source: RemoteSource, server: TeacherServer, kind: str, value: Any, message: str
) -> None:
    server.fail("/", kind, times=1000, value=value)
    with pytest.raises(ServerError, match=message):
        source(collated())


@pytest.mark.parametrize("form", ["raw", "low", "few", "none", "other"])
def test_answers_that_cannot_be(source: RemoteSource, server: TeacherServer, form: str) -> None:
    server.forms = {form}
    with pytest.raises(ServerError, match=f"{server.url}/.*: the answer is of no use: "):
        source(collated())


def test_a_sequence_too_long(source: RemoteSource, server: TeacherServer) -> None:
    long = {"input_ids": list(range(3, 67)), "labels": list(range(3, 67))}
    message = (
        "a sequence of 64 tokens, and .* takes 63 and one of its own; start it with "
        r"--max-model-len 65, or write data: \{max_length: 63\}"
    )
    with pytest.raises(InputError, match=message):
        source(collated(rows=[long]))
    assert server.received == []


def test_asked_for_something_else(source: RemoteSource) -> None:
    source.ask(Request(logits=True))
    source.ask(Request())
    message = "teacher me/t is Remote, .* and hidden state 2 is asked for; write Logits alone"
    with pytest.raises(InputError, match=message):
        source.ask(Request(hidden=frozenset({4, 2})))
    with pytest.raises(InputError, match="and attention of block 3 is asked for"):
        source.ask(Request(heads=frozenset({3})))


def test_closing(source: RemoteSource) -> None:
    source.close()
    source.close()
    assert source.model is None
    for use in (lambda: source(collated()), lambda: source.ask(Request(logits=True))):
        with pytest.raises(RuntimeError, match="this teacher was closed"):
            use()


def test_a_mask_is_not_needed() -> None:
    ids = torch.arange(3, 9).view(2, 3)
    batch = collated(lambda _: {"input_ids": ids, "labels": ids}, rows=[0])
    assert asked_of(batch) == [Asked([3, 4, 5], [0, 1]), Asked([6, 7, 8], [0, 1])]


@pytest.mark.parametrize("most", [1, 3, 4, 9])
def test_parts_are_even_and_whole(most: int) -> None:
    asked = [Asked([k, k], [0]) for k in range(7)]
    parts = list(shared_out(asked, most))
    sizes = [len(part) for part in parts]
    assert len(parts) == min(most, 7)
    assert max(sizes) - min(sizes) <= 1
    assert [one for part in parts for one in part] == asked
    assert list(shared_out([], most)) == []
