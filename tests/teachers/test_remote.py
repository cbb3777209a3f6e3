"""`Remote`: the spec, where keys go, and students that learn from it as from the model itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llm_distill import (
    AttentionMaps,
    CrossEntropy,
    DistillTrainer,
    Ensemble,
    HiddenStates,
    Local,
    Logits,
    Remote,
    Routed,
    Taid,
    decoupled,
    jsd,
    reverse_kl,
)
from llm_distill.errors import InputError, ServerError
from llm_distill.layers import last, uniform
from llm_distill.losses.sparse import TopK
from llm_distill.rows import Batch
from llm_distill.signals import ModelSpec, Request, Signals
from llm_distill.teachers import Source, Teacher, probing
from llm_distill.teachers import client as client_module
from tests import on_disk, tiny
from tests.launch import launch
from tests.teacher_server import TeacherServer

CPU = torch.device("cpu")
LOGITS = Request(logits=True)
SECRET = "sk-very-secret"
K = 8


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(probing, "HASTE", 0.4)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Config and tokenizer of the teacher in a folder, without weights."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.llama("teacher").config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server(teacher: PreTrainedModel) -> Iterator[TeacherServer]:
    with TeacherServer(teacher, tiny.tokenizer(), longest=64) as running:
        yield running


@pytest.fixture
def remote(server: TeacherServer, of: str) -> Remote:
    return Remote(server.url, "teacher", top_k=K, of=of, patience=2.0)


class Sparse:
    """The same targets, made here of whole logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._local = Local(model)

    @property
    def config(self) -> PreTrainedConfig:
        return self._local.config

    @property
    def spec(self) -> ModelSpec:
        return self._local.spec

    def find_tokenizer(self) -> Any | None:
        return None

    def check(self, request: Request, device: torch.device) -> None:
        self._local.check(request, device)

    def open(self, request: Request, device: torch.device) -> Source:
        return SparseSource(self._local.open(request, device))


class SparseSource:
    def __init__(self, whole: Source) -> None:
        self.model: PreTrainedModel | None = None
        self.told: tuple[str, ...] = ()
        self._whole = whole

    def __call__(self, batch: Batch) -> Signals:
        told = self._whole(batch)
        return replace(told, distribution=TopK.of(told.whole.logits(slice(None)), K))

    def prepare(self, batches: Sequence[Batch]) -> None:
        del batches

    def ask(self, request: Request) -> None:
        self._whole.ask(request)

    def close(self) -> None:
        self._whole.close()


class TestSpec:
    def test_it_is_a_teacher(self, remote: Remote) -> None:
        assert isinstance(remote, Teacher)
        assert remote == replace(remote)

    @pytest.mark.parametrize(
        "url", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/"]
    )
    def test_urls_with_and_without_v1(self, url: str) -> None:
        assert Remote(url, "m").url == "http://h:8000"
        assert Remote("https://h/llm/v1", "m").url == "https://h/llm"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"url": "localhost:8000"}, "url is 'localhost:8000'; write http://host:8000"),
            ({"url": ""}, "url is ''"),
            ({"url": "ftp://h"}, "url is 'ftp://h'"),
            ({"url": f"http://me:{SECRET}@h"}, "the url holds more than a host and a path"),
            ({"url": f"http://h/v1?api_key={SECRET}"}, "put the key into the environment"),
            ({"url": f"http://[::1{SECRET}"}, "the url cannot be read; write http://host:8000"),
            ({"url": 3}, "the url cannot be read; write http://host:8000"),
            ({"url": "http://ex ample:80"}, "url is 'http://ex ample:80'; write http://host:8000"),
            ({"url": "http://h:80 "}, "url is 'http://h:80 '"),
            ({"url": "http://h/a b"}, "url is 'http://h/a b'"),
            ({"url": "http://h\n:80"}, r"url is 'http://h\\n:80'"),
            ({"top_k": 0}, "top_k is 0; write a number from 1 on"),
            ({"top_k": 2.5}, r"top_k is 2\.5"),
            ({"concurrency": True}, "concurrency is True"),
            ({"timeout": 0.0}, r"timeout is 0\.0; write a number of seconds"),
            ({"patience": float("nan")}, "patience is nan"),
            ({"url": "http://h:eight"}, "url is 'http://h:eight'"),
            ({"timeout": "long"}, "timeout is 'long'; write a number of seconds"),
            ({"patience": float("inf")}, "patience is inf"),
            ({"dialect": "openai"}, "dialect is 'openai'; write one of auto, vllm, sglang"),
            ({"key_from": SECRET}, "key_from is no name of a variable; put the key into the env"),
        ],
    )
    def test_what_cannot_be_meant(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message) as raised:
            Remote(**{"url": "http://h:8000", "model": "m"} | changes)
        assert SECRET not in str(raised.value)

    def test_from_config_and_server(self, remote: Remote, server: TeacherServer, of: str) -> None:
        spec = remote.spec
        assert (spec.name, spec.depth, spec.width, spec.vocabulary) == (of, 4, 64, 128)
        assert spec.positions == 63  # one token of the server's own has to fit as well
        tokenizer = remote.find_tokenizer()
        assert tokenizer is not None
        assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
        _ = remote.spec
        assert len(server.received) == 1

    def test_a_model_that_is_no_id_needs_of(self) -> None:
        with pytest.raises(InputError, match=r"cannot be read.*; write of: the Hub id or the path"):
            _ = Remote("http://localhost:1", "the-big-one").config

    def test_a_masked_model(self, tmp_path: Path) -> None:
        tiny.bert().config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="is a masked language model, and servers tell what"):
            _ = Remote("http://localhost:1", "m", of=str(tmp_path)).config


class TestKeys:
    def sent(self, server: TeacherServer) -> set[str | None]:
        return {request.key for request in server.received}

    def test_none_by_default(self, remote: Remote, server: TeacherServer) -> None:
        remote.open(LOGITS, CPU).close()
        assert self.sent(server) == {None}

    @pytest.mark.parametrize("named", [None, "MY_KEY"])
    def test_from_the_environment(
        self,
        remote: Remote,
        server: TeacherServer,
        monkeypatch: pytest.MonkeyPatch,
        named: str | None,
    ) -> None:
        server.key = SECRET
        monkeypatch.setenv(named or "OPENAI_API_KEY", SECRET)
        given = replace(remote, key_from=named)
        given.open(LOGITS, CPU).close()
        assert self.sent(server) == {SECRET}
        assert SECRET not in repr(given)

    def test_one_that_is_named_and_not_there(self, remote: Remote) -> None:
        with pytest.raises(InputError, match="the environment has no MY_KEY; set it, or leave"):
            replace(remote, key_from="MY_KEY").check(LOGITS, CPU)

    @pytest.mark.parametrize(
        ("url", "named", "expected"),
        [
            ("http://127.0.0.1:8000", None, SECRET),
            ("http://localhost:8000", None, SECRET),
            ("https://api.example.com", None, SECRET),
            ("http://10.0.0.7:8000", None, None),
            ("http://10.0.0.7:8000", "OPENAI_API_KEY", SECRET),
        ],
    )
    def test_the_default_one_stays_off_open_lines(
        self, monkeypatch: pytest.MonkeyPatch, url: str, named: str | None, expected: str | None
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        assert Remote(url, "m", key_from=named)._key() == expected

    @pytest.mark.parametrize("inside", ["\n", "\r", "\t", "\x7f", "ü", "\u2028"])
    @pytest.mark.parametrize("named", [None, "MY_KEY"])
    def test_one_that_no_request_can_carry(
        self,
        remote: Remote,
        server: TeacherServer,
        monkeypatch: pytest.MonkeyPatch,
        inside: str,
        named: str | None,
    ) -> None:
        monkeypatch.setenv(named or "OPENAI_API_KEY", f"sk-first{inside}{SECRET}")
        message = f"the key in {named or 'OPENAI_API_KEY'} has characters that no request can"
        with pytest.raises(InputError, match=message) as raised:
            replace(remote, key_from=named).check(LOGITS, CPU)
        assert "sk-" not in str(raised.value)
        assert server.received == []

    def test_a_line_break_after_it_is_none_of_it(
        self, remote: Remote, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As files of secrets end."""
        server.key = SECRET
        monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
        remote.open(LOGITS, CPU).close()
        assert self.sent(server) == {SECRET}

    def test_a_wrong_one_is_not_repeated(
        self, remote: Remote, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        server.fail("/v1/models", "status", value=401)  # it quotes what it was sent
        with pytest.raises(InputError, match=r"status 401: sent with \[key\]; a key is") as raised:
            remote.check(LOGITS, CPU)
        assert SECRET not in str(raised.value)


class TestOpen:
    def test_it_is_asked_once_what_it_is(self, remote: Remote, server: TeacherServer) -> None:
        remote.check(LOGITS, CPU)
        source = remote.open(LOGITS, CPU)
        paths = [request.path for request in server.received]
        assert paths == ["/v1/models", "/v1/completions", "/tokenize"]
        source.close()

    def test_nothing_is_probed_that_is_not_asked_for(
        self, remote: Remote, server: TeacherServer
    ) -> None:
        remote.open(Request(), CPU).close()
        assert [request.path for request in server.received] == ["/v1/models"]

    def test_a_tokenizer_that_cannot_be_checked_is_told(
        self, remote: Remote, server: TeacherServer
    ) -> None:
        source = remote.open(LOGITS, CPU)
        assert "checked" not in source.told[0]
        source.close()
        server.tokenizer = None
        source = replace(remote).open(LOGITS, CPU)
        assert source.told[0].endswith("; it does not cut texts, so its tokenizer is not checked")
        source.close()

    def test_what_is_put_aside_is_told(self, remote: Remote) -> None:
        source = remote.cut(120).open(LOGITS, CPU)
        assert "; the last 8 of its 128 tokens, which the student does not have" in source.told[0]
        source.close()

    def test_more_tokens_than_there_are(self, remote: Remote) -> None:
        with pytest.raises(
            InputError, match=r"top_k is 200 and .* has 128 tokens; write top_k: 128"
        ):
            replace(remote, top_k=200).open(LOGITS, CPU)

    def test_another_tokenizer(self, remote: Remote, server: TeacherServer) -> None:
        server.tokenizer = tiny.tokenizer(100)
        server.tokenizer.add_tokens(["12"])
        with pytest.raises(InputError, match="has another tokenizer than"):
            remote.open(LOGITS, CPU)


def trained(
    folder: Path, teacher: Any, objectives: Any, dialect: str = "vllm", **changes: Any
) -> DistillTrainer:
    args = tiny.arguments(folder, **{"learning_rate": 0.1} | changes)
    data = tiny.rows(24, empty=(1, 9))
    trainer = DistillTrainer(
        tiny.llama("student"), teacher, objectives, args, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    return trainer


def weights(trainer: DistillTrainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.distiller.parameters())


DECOUPLED: Any = decoupled

OBJECTIVES: dict[str, Callable[[], list[Any]]] = {
    "forward_kl": lambda: [CrossEntropy(weight=0.1), Logits()],
    "tempered": lambda: [Logits(temperature=2.0), Logits(loss=jsd, name="second")],
    "others": lambda: [Logits(loss=reverse_kl), Logits(loss=DECOUPLED, name="second")],
    "moving": lambda: [Logits(target=Taid(start=0.3))],
}


class TestTraining:
    @pytest.mark.parametrize("owner", ["vllm", "sglang"])
    @pytest.mark.parametrize("name", list(OBJECTIVES))
    def test_a_student_learns_as_from_the_same_targets_made_here(
        self,
        tmp_path: Path,
        remote: Remote,
        server: TeacherServer,
        teacher: PreTrainedModel,
        owner: str,
        name: str,
    ) -> None:
        server.owner = owner
        made = OBJECTIVES[name]
        far = trained(tmp_path, remote, made())
        near = trained(tmp_path, Sparse(teacher), made())
        start = torch.nn.utils.parameters_to_vector(tiny.llama("student").parameters())
        assert (weights(near) - start).abs().max() > 1e-3
        assert (weights(far) - weights(near)).abs().max() < 3e-7
        one, other = far.evaluate(), near.evaluate()
        assert one["eval_kl"] == pytest.approx(other["eval_kl"], abs=1e-6)
        assert {key for key in one if "teacher" in key or "agreement" in key} == set()

    @pytest.mark.parametrize("name", list(OBJECTIVES))
    @pytest.mark.parametrize("role", ["members", "experts"])
    def test_two_of_them_as_members_and_as_experts(
        self, tmp_path: Path, remote: Remote, of: str, role: str, name: str
    ) -> None:
        """As the same targets made here, under every kind of objective."""
        other = tiny.sharpened(LlamaForCausalLM, tiny.llama("teacher").config, seed=5)

        def several(one: Any, two: Any) -> Any:
            if role == "members":
                return Ensemble([one, two], [2, 1])
            return Routed({"a": one, "b": two}, by="kind")

        def end(teacher: Any) -> DistillTrainer:
            rows = tiny.rows(24, empty=(1, 9))
            rows = rows.add_column("kind", ["ab"[k % 3 // 2] for k in range(24)])
            args = tiny.arguments(tmp_path, learning_rate=0.1)
            data: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows}
            made = DistillTrainer(tiny.llama("student"), teacher, OBJECTIVES[name](), args, **data)
            made.train()
            return made

        with TeacherServer(other, tiny.tokenizer(), longest=64, owner="sglang") as second:
            far = end(several(remote, Remote(second.url, "teacher", K, of)))
            asked = second.asked("/generate")
            far_kl = far.evaluate()["eval_kl"]
        near = end(several(Sparse(tiny.llama("teacher")), Sparse(other)))
        assert len(asked) > 3  # more than at the start
        assert (weights(far) - weights(near)).abs().max() < 1e-6
        assert far_kl == pytest.approx(near.evaluate()["eval_kl"], abs=1e-5)
        alone = end(remote)
        assert (weights(far) - weights(alone)).abs().max() > 1e-4

    def test_whole_rows_are_the_whole_divergence(
        self, tmp_path: Path, remote: Remote, server: TeacherServer, teacher: PreTrainedModel
    ) -> None:
        server.most = 128
        far = trained(tmp_path, replace(remote, top_k=128), [Logits()])
        near = trained(tmp_path, teacher, [Logits()])
        assert (weights(far) - weights(near)).abs().max() < 1e-6
        assert far.evaluate()["eval_kl"] == pytest.approx(near.evaluate()["eval_kl"], abs=1e-5)

    def test_faults_do_not_change_the_weights(
        self,
        tmp_path: Path,
        remote: Remote,
        server: TeacherServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(probing, "HASTE", 20.0)
        remote = replace(remote, patience=20.0)
        calm = weights(trained(tmp_path, remote, [Logits()]))
        for path, kind, value in (
            ("/v1/models", "status", 503),
            ("/v1/completions", "drop", None),
            ("/v1/completions", "busy", 0),
            ("/v1/completions", "garbage", None),
        ):
            server.fail(path, kind, times=2, value=value)
        assert torch.equal(weights(trained(tmp_path, replace(remote), [Logits()])), calm)

    def test_resuming_is_bit_exact(self, tmp_path: Path, remote: Remote) -> None:
        saved: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        whole = trained(tmp_path / "whole", remote, [Logits()], **saved)
        args = tiny.arguments(tmp_path / "again", max_steps=4, learning_rate=0.1)
        data = tiny.rows(24, empty=(1, 9))
        again = DistillTrainer(
            tiny.llama("student"), remote, [Logits()], args, train_dataset=data, eval_dataset=data
        )
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert torch.equal(weights(again), weights(whole))

    @pytest.mark.parametrize("batch", [8, 2])
    def test_a_step_is_asked_for_at_once_and_is_the_same(
        self, tmp_path: Path, remote: Remote, server: TeacherServer, batch: int
    ) -> None:
        whole = weights(trained(tmp_path, remote, [Logits()]))
        before, server.at_once = len(server.asked("/v1/completions")), 0
        server.fail("/v1/completions", "slow", times=1000, value=0.03)
        changes: dict[str, Any] = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 8 // batch,
        }
        parts = trained(tmp_path, remote, [Logits()], **changes)
        assert (weights(parts) - whole).abs().max() < 3e-7
        assert server.at_once > 4  # more than a micro-batch of two
        sent = server.asked("/v1/completions")[before:]
        assert sum(len(r.body["prompt"]) for r in sent) == 22  # each sequence with rows, once

    def test_packed_is_as_padded(self, tmp_path: Path, remote: Remote) -> None:
        """Packs of 8 are longer than the 64 positions of the models; their examples are not."""
        args, data = tiny.arguments(tmp_path, learning_rate=0.1), tiny.rows(24)
        ends = []
        for collator in (DataCollatorWithFlattening(), None):
            made = DistillTrainer(
                tiny.llama("student"),
                remote,
                [Logits()],
                args,
                train_dataset=data,
                data_collator=collator,
            )
            made.train()
            ends.append(weights(made))
        assert (ends[0] - ends[1]).abs().max() < 1e-6

    @pytest.mark.parametrize("role", ["alone", "member", "expert"])
    def test_a_student_without_the_padding(
        self, tmp_path: Path, server: TeacherServer, role: str
    ) -> None:
        """As `Local`, which is cut: the student has 120 of the teacher's 128 tokens."""
        words = tiny.tokenizer(120)
        server.tokenizer, server.most = words, 128
        tiny.llama("teacher").config.save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        ids = [[min(token, 119) for token in row["input_ids"]] for row in tiny.rows(24)]
        data = datasets.Dataset.from_list(
            [{"input_ids": i, "labels": i, "by": "ab"[k % 2]} for k, i in enumerate(ids)]
        )

        def end(teacher: Any) -> torch.Tensor:
            args = tiny.arguments(tmp_path / "out", learning_rate=0.1)
            student = tiny.llama("student", vocabulary=120)
            given = {"train_dataset": data, "processing_class": words}
            made = DistillTrainer(student, teacher, [Logits()], args, **given)
            made.train()
            return weights(made)

        def several(teacher: Any) -> Any:
            if role == "alone":
                return teacher
            if role == "member":
                return Ensemble([teacher, teacher])
            return Routed({"a": teacher, "b": teacher}, by="by")

        whole = end(several(Remote(server.url, "teacher", 128, str(tmp_path))))
        near = end(Local(tiny.llama("teacher"), tokenizer=words))
        assert (whole - near).abs().max() < 1e-6
        few = Remote(server.url, "teacher", K, str(tmp_path))
        assert end(several(few)).isfinite().all()
        assert few.common is None  # the user's own stays as it was

    def test_a_server_that_dies_is_told_and_nothing_hangs(
        self, tmp_path: Path, remote: Remote, server: TeacherServer
    ) -> None:
        args = tiny.arguments(tmp_path)
        given = replace(remote, patience=0.3)
        trainer = DistillTrainer(
            tiny.llama("student"), given, [Logits()], args, train_dataset=tiny.rows(24)
        )
        server.fail("/v1/completions", "drop", times=10_000)
        with pytest.raises(ServerError, match=r"/v1/completions: .*; asked \d+ times in"):
            trainer.train()

    @pytest.mark.distributed
    def test_two_ranks_ask_for_their_own_rows(
        self, tmp_path: Path, server: TeacherServer, of: str
    ) -> None:
        found = []
        for ranks in (1, 2):
            server.received.clear()
            file = tmp_path / f"{ranks}.pt"
            launch("tests.remote_worker", server.url, of, str(file), ranks=ranks)
            prompts = [p for r in server.asked("/v1/completions") for p in r.body["prompt"]]
            found.append((torch.load(file), sorted(prompts)))
        (one, asked_by_one), (two, asked_by_two) = found
        assert (one - two).abs().max() < 1e-6
        probe = list(range(1, 9))
        assert asked_by_two == sorted([*asked_by_one, probe])  # each asks about its rows only


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (HiddenStates(layers=uniform), r"is Remote, .* and hidden state 2 is asked for"),
        (AttentionMaps(layers=last), r"is Remote, .* and attention of block 4 is asked for"),
    ],
)
def test_signals_that_do_not_travel_are_refused_before_weights_load(
    tmp_path: Path,
    remote: Remote,
    monkeypatch: pytest.MonkeyPatch,
    objective: Any,
    message: str,
) -> None:
    student = on_disk.save_model(tmp_path / "student", "student")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(InputError, match=message):
        DistillTrainer(
            str(student),
            remote,
            [objective, Logits()],
            tiny.arguments(tmp_path / "out"),
            processing_class=tiny.tokenizer(),
            train_dataset=tiny.rows(4),
        )
